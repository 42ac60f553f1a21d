# SPDX-License-Identifier: Apache-2.0
"""The command `quantize`: a folder in, a packed folder out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..config import GPTQ_INPUTS, KV_BITS, SCHEMES, WEIGHTS, QuantConfig
from ..methods.registry import METHODS
from .shared import add_command, progress_bar


def add(commands) -> None:
    """Add the command to the parser's."""
    defaults = QuantConfig()
    c = add_command(commands, "quantize", run,
                     "Quantize a save_pretrained folder in one sweep.")
    c.add_argument("model", metavar="MODEL", type=Path)
    c.add_argument("out", metavar="OUT", type=Path)
    c.add_argument("--scheme", choices=SCHEMES,
                   help=f"bits of weights and activations (default {defaults.scheme}); w4a8 is "
                        "much closer to the original and about as fast on most CPUs")
    c.add_argument("--method", choices=METHODS,
                   help=f"transformation of the activations (default {defaults.method})")
    c.add_argument("--weights", choices=WEIGHTS,
                   help="rounding: rtn = to nearest, mse = to nearest with a searched clip, gptq = "
                        "that with error feedback, the most accurate and the slowest "
                        f"(default {defaults.weights})")
    c.add_argument("--gptq-inputs", choices=GPTQ_INPUTS,
                   help="inputs that gptq looks at: as they are, or quantized as they will be run "
                        f"(default {defaults.gptq_inputs})")
    c.add_argument("--gptq-order", action=argparse.BooleanOptionalAction, default=None,
                   help="gptq rounds the inputs of largest energy first (default "
                        f"{'yes' if defaults.gptq_order else 'no'})")
    c.add_argument("--learned", metavar="FILE",
                   help="method spinquant: rotations learned before, instead of learning them")
    c.add_argument("--group-size", type=int, metavar="G",
                   help="inputs that share a weight scale, a multiple of 32 (default 0: the whole "
                        "output channel)")
    c.add_argument("--kv-bits", type=int, choices=KV_BITS,
                   help="bits of cached keys and values when the model runs; 8 and 4 also rotate "
                        f"the value heads (default {defaults.kv_bits})")
    c.add_argument("--clip", type=float, metavar="R",
                   help="share of a token's largest activation that the codes reach (default: the "
                        "scheme's)")
    c.add_argument("--calibration", type=Path, metavar="FILE",
                   help="UTF-8 text (default: a bundled one)")
    c.add_argument("--calibration-tokens", type=int, metavar="N",
                   help=f"default {defaults.calibration_tokens}")
    c.add_argument("--seed", type=int, metavar="N",
                   help="0 calibrates on the first windows of the text, others draw them (default "
                        f"{defaults.seed})")
    c.add_argument("--ignore", action="append", metavar="PATTERN",
                   help="linears to leave in 16 bits, such as '*.down_proj'; may be repeated")
    c.add_argument("--recipe", type=Path, metavar="FILE",
                   help="the same options as JSON; those given here win")
    c.add_argument("--resume", action="store_true",
                   help="go on with the layers an interrupted run left in OUT.partial")
    c.add_argument("--dry-run", action="store_true",
                   help="process one layer, write nothing, print size and time")


def config_from(arguments: argparse.Namespace) -> QuantConfig:
    """The recipe file's values, overwritten by the options given."""
    recipe = QuantConfig.from_file(arguments.recipe) if arguments.recipe else QuantConfig()
    names = ("scheme", "method", "weights", "group_size", "clip", "calibration_tokens", "seed",
             "ignore", "gptq_inputs", "gptq_order", "learned", "kv_bits")
    given = {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}
    return QuantConfig.from_json({**recipe.to_json(), **given})


def run(arguments: argparse.Namespace) -> None:
    """What the parsed command line asks for."""
    from ..sweep.estimate import dry_run
    from ..sweep.run import quantize_folder

    config = config_from(arguments)
    if arguments.dry_run:
        estimate = dry_run(arguments.model, config, arguments.calibration)
        print(f"size        {megabytes(estimate.bytes_before)} -> "
              f"{megabytes(estimate.bytes_after)} (within a few percent)")
        print(f"time        about {estimate.seconds:.1f} s (the first layer's, scaled up)")
        print(f"peak memory about {megabytes(estimate.peak_memory)} besides the mapped weights")
        return
    with progress_bar("quantizing", "layer") as update:
        summary = quantize_folder(arguments.model, arguments.out, config, arguments.calibration,
                                  resume=arguments.resume, recipe=arguments.recipe,
                                  progress=update)
    print_summary(summary)


def print_summary(summary) -> None:
    """What was done, at what cost, and what to do next."""
    config = summary.config
    tokens = f"{summary.calibration_tokens} tokens"
    if summary.calibration_tokens != config.calibration_tokens:
        tokens += f", {config.calibration_tokens} asked"
    print(f"{summary.out}: {config.scheme}, method {config.method}, weights {config.weights}, "
          f"activation clip {config.activation_clip:g}, kv bits {config.kv_bits}")
    print(f"size        {megabytes(summary.bytes_before)} -> {megabytes(summary.bytes_after)}")
    print(f"time        {summary.seconds:.1f} s: calibrate {summary.calibration_seconds:.1f} "
          f"({tokens}), solve {summary.solve_seconds:.1f}, "
          f"quantize and pack {summary.quantize_seconds:.1f}")
    print(f"peak memory {megabytes(summary.peak_memory)} besides the mapped weights")
    if summary.resumed_layers:
        print(f"resumed     {summary.resumed_layers} layers were whole; counts are of the others")
    if summary.sites:
        print("per layer   site      factors   balance   ART steps   URT rotations   "
              "sweep rotations   8-bit inputs")
    for site in dict.fromkeys(s.site for s in summary.sites):
        rows = [s for s in summary.sites if s.site == site]
        counts = [spread([getattr(r, field) for r in rows])
                  for field in ("art_steps", "urt_steps", "sweep_rotations", "int8_inputs")]
        size = f"{rows[0].k1}x{rows[0].k2}"
        balance = "yes" if rows[0].balanced else "no"
        print(f"            {site:<9} {size:<9} {balance:>7}   {counts[0]:>9}   {counts[1]:>13}   "
              f"{counts[2]:>15}   {counts[3]:>12}")
    if config.scheme == "w4a4":
        print("hint        --scheme w4a8 is much closer to the original and, on most CPUs, as fast")


def spread(values: Sequence[int]) -> str:
    """'7' or '3-9'."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
