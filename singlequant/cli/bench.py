# SPDX-License-Identifier: Apache-2.0
"""The command `bench`: the packed linears timed on this machine, or a whole model."""

from __future__ import annotations

import argparse

from .shared import add_command, add_dequantize, add_kv_bits, some_path

SECONDS = 5.0  # default of --seconds


def add(commands) -> None:
    """Add the command to the parser's."""
    c = add_command(commands, "bench", run,
                    "Time the packed linears on this machine, against float32 and its peaks; or a "
                    "model, in the terms of llama-bench.")
    c.add_argument("model", metavar="MODEL_OR_OUT", type=some_path, nargs="?",
                   help="time prefill and decode of this model (default: the linears)")
    c.add_argument("-p", "--prompt-tokens", type=int, metavar="N",
                   help="with a model: tokens of the prefill (default 512; 0 leaves it out)")
    c.add_argument("-n", "--new-tokens", type=int, metavar="N",
                   help="with a model: tokens of the decode (default 128; 0 leaves it out)")
    c.add_argument("-r", "--repeats", type=int, metavar="N",
                   help="with a model: how often each is timed (default 5)")
    c.add_argument("--seconds", type=float, metavar="S",
                   help="without a model: time to measure for, besides some to prepare (default "
                        f"{SECONDS:g})")
    c.add_argument("--json", type=some_path, metavar="FILE", help="figures and machine")
    add_kv_bits(c)
    add_dequantize(c)


def run(arguments: argparse.Namespace) -> None:
    """What the parsed command line asks for."""
    from .. import files
    from ..study import bench, bench_model

    if arguments.json is not None:
        files.check_file(arguments.json)
    options = {name: getattr(arguments, name)
               for name in ("prompt_tokens", "new_tokens", "repeats", "kv_bits")
               if getattr(arguments, name) is not None}
    if arguments.model is None:
        for name in options:
            raise ValueError(f"--{name.replace('_', '-')}: expected a model beside it, found none")
        result = bench.bench(SECONDS if arguments.seconds is None else arguments.seconds)
        print(bench.report(result))
    else:
        if arguments.seconds is not None:
            raise ValueError("--seconds: expected no model beside it; --repeats sets how often one "
                             "is timed")
        result = bench_model.bench_model(arguments.model, dequantize=arguments.dequantize,
                                         **options)
        print(bench_model.report_model(result))
    if arguments.json is not None:
        files.write_file(arguments.json, files.json_text(result, indent=1) + "\n")
