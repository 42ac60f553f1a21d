# SPDX-License-Identifier: Apache-2.0
"""The command `quantize`: a folder in, a packed folder out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..config import (
    CALIBRATION_BITS,
    DEFAULT_TOKENS,
    GPTQ_INPUTS,
    KV_BITS,
    SCHEMES,
    WEIGHTS,
    QuantConfig,
)
from ..methods.registry import METHODS
from .shared import (
    add_calibration,
    add_command,
    add_dequantize,
    add_table_bits,
    add_workers,
    opened_workers,
    progress_bar,
    some_path,
    writing_part,
)


def add(commands) -> None:
    """Add the command to the parser's."""
    defaults = QuantConfig()
    c = add_command(commands, "quantize", run,
                     "Quantize a save_pretrained folder in one sweep.")
    c.add_argument("model", metavar="MODEL", type=some_path)
    c.add_argument("out", metavar="OUT", type=some_path)
    c.add_argument("--scheme", choices=SCHEMES,
                   help=f"bits of weights and activations (default {defaults.scheme}); w4a4 is the "
                        "paper's: further from the original and about as fast on most CPUs")
    c.add_argument("--method", choices=METHODS,
                   help=f"transformation of the activations (default {defaults.method})")
    c.add_argument("--weights", choices=WEIGHTS,
                   help="rounding: rtn = to nearest, mse = to nearest with a searched clip, gptq = "
                        "that with error feedback, the most accurate and the slowest "
                        f"(default {defaults.weights})")
    c.add_argument("--calibration-bits", type=int, choices=CALIBRATION_BITS,
                   help="8: calibration runs on weights and activations of 8 bits, several times "
                        "as fast; 32: on the model as it is (default "
                        f"{defaults.calibration_bits})")
    c.add_argument("--gptq-inputs", choices=GPTQ_INPUTS,
                   help="inputs that gptq looks at: as they are, or quantized as they will be run "
                        f"(default {defaults.gptq_inputs})")
    c.add_argument("--gptq-order", action=argparse.BooleanOptionalAction, default=None,
                   help="gptq rounds the inputs of largest energy first (default "
                        f"{'yes' if defaults.gptq_order else 'no'})")
    c.add_argument("--learned", metavar="FILE",
                   help="method spinquant: rotations learned before, instead of learning them")
    c.add_argument("--bits", type=float, metavar="B",
                   help="bits of a weight on average, 4 to 8: above 4, linears that count most get "
                        f"5, 6 or 8 (default {defaults.bits:g})")
    c.add_argument("--group-size", type=int, metavar="G",
                   help="inputs that share a weight scale, a multiple of 32 (default 0: the whole "
                        "output channel)")
    c.add_argument("--kv-bits", type=int, choices=KV_BITS,
                   help="bits of cached keys and values when the model runs; 8 and 4 also rotate "
                        f"the value heads (default {defaults.kv_bits})")
    add_table_bits(c)
    c.add_argument("--clip", type=float, metavar="R",
                   help="share of a token's largest activation that the codes reach (default: the "
                        "scheme's)")
    add_calibration(c)
    c.add_argument("--calibration-tokens", type=int, metavar="N",
                   help=f"default {DEFAULT_TOKENS['gptq']}, with other rounding "
                        f"{DEFAULT_TOKENS['mse']}")
    c.add_argument("--calibration-window", type=int, metavar="N",
                   help="tokens that are run as one text, at most the model's maximum: longer for "
                        f"models of long texts (default {defaults.calibration_window})")
    c.add_argument("--seed", type=int, metavar="N",
                   help="0 calibrates on the first windows of the text, others draw them (default "
                        f"{defaults.seed})")
    c.add_argument("--ignore", action="append", metavar="PATTERN",
                   help="linears, embedding or head to leave in 16 bits, such as '*.down_proj'; "
                        "may be repeated")
    c.add_argument("--recipe", type=some_path, metavar="FILE",
                   help="the same options as JSON; those given here win")
    c.add_argument("--resume", action="store_true",
                   help="go on with the layers an interrupted run left in OUT.partial")
    add_workers(c)
    add_dequantize(c)
    c.add_argument("--no-check", action="store_true",
                   help="do not measure at the end what quantizing cost, on a little held-out text")
    c.add_argument("--dry-run", action="store_true",
                   help="process the first layers, write nothing, print size and time")


def config_from(arguments: argparse.Namespace) -> QuantConfig:
    """The recipe file's values, overwritten by the options given."""
    names = [field.name for field in fields(QuantConfig)]
    given = {n: getattr(arguments, n) for n in names if getattr(arguments, n, None) is not None}
    if arguments.recipe:
        return QuantConfig.from_file(arguments.recipe, given)
    return QuantConfig.from_json(given)


def run(arguments: argparse.Namespace) -> None:
    """What the parsed command line asks for."""
    from ..checkpoint.folder import load_checkpoint
    from ..rotations import factors_text
    from ..sweep.estimate import dry_run
    from ..sweep.run import quantize_folder

    config = config_from(arguments)
    model = load_checkpoint(arguments.model, arguments.dequantize)
    if arguments.dry_run:
        with progress_bar("estimating", "layer") as update:
            estimate = dry_run(model, config, arguments.calibration, writing_part(update))
        print(f"size        {megabytes(estimate.bytes_before)} -> "
              f"{megabytes(estimate.bytes_after)} (within a few percent)")
        print(f"time        about {estimate.seconds:.1f} s (the first layers', scaled up)")
        print(f"peak memory about {megabytes(estimate.peak_memory)} besides the mapped weights")
        if estimate.poor_factors:
            print(f"factors     none short enough for {factors_text(estimate.poor_factors)}: these "
                  "sites are rotated less well and more slowly")
        return
    checked = Check(model)
    with opened_workers(arguments) as workers, progress_bar("quantizing", "layer") as update:
        summary = quantize_folder(model, arguments.out, config, arguments.calibration,
                                  resume=arguments.resume, recipe=arguments.recipe,
                                  progress=update, writing=writing_part(update), workers=workers,
                                  check=None if arguments.no_check else checked)
    print_summary(summary)
    if checked.error is not None:
        raise checked.error
    if checked.result is not None:
        print_check(checked.result)


class Check:
    """`study.check` of a folder beside `model`; an error is kept, as it spoils no folder."""

    def __init__(self, model) -> None:
        self.model, self.result, self.error = model, None, None

    def __call__(self, folder: Path):
        from ..study.check import check

        try:
            self.result = check(folder, self.model)
        except Exception as error:
            self.error = error
        return self.result


def print_check(result) -> None:
    """What quantizing cost, on held-out text."""
    print(f"check       KL {result.kl_mean:.4f} nats per token, perplexity "
          f"{result.reference_perplexity:.2f} -> {result.perplexity:.2f}, on {result.predictions} "
          f"predictions of the bundled held-out text ({result.seconds:.1f} s)")


def print_summary(summary) -> None:
    """What was done, at what cost, and what to do next."""
    from ..sweep.experts import FEW_TOKENS

    config = summary.config
    tokens = f"{summary.calibration_tokens} tokens"
    if summary.calibration_tokens != config.calibration_tokens:
        tokens += f", {config.calibration_tokens} asked"
    print(f"{summary.out}: {config.scheme}, method {config.method}, weights {config.weights}, "
          f"activation clip {config.activation_clip:g}, kv bits {config.kv_bits}")
    tables = "".join(f", {name} {bits}" for name, bits in summary.table_bits.items())
    print(f"bits        {config.bits:.4g} a weight of the linears on average{tables}")
    print(f"size        {megabytes(summary.bytes_before)} -> {megabytes(summary.bytes_after)}")
    print(f"time        {summary.seconds:.1f} s: calibrate {summary.calibration_seconds:.1f} "
          f"({tokens}), solve {summary.solve_seconds:.1f}, "
          f"quantize and pack {summary.quantize_seconds:.1f}")
    if summary.written_tokens:
        print(f"wrote       {summary.written_tokens} calibration tokens in "
              f"{summary.writing_seconds:.1f} s")
    print(f"peak memory {megabytes(summary.peak_memory)} besides the mapped weights")
    if summary.kv_dtype != config.kv_dtype:
        print(f"kv cache    {summary.kv_dtype}, as keys or values of calibration came near an end "
              f"of {config.kv_dtype}'s range")
    if summary.resumed_layers:
        print(f"resumed     {summary.resumed_layers} layers were whole; counts are of the others")
    if summary.sites:
        print("per layer   site      factors   balance   ART steps   URT rotations   "
              "sweep rotations   8-bit inputs")
    for site in dict.fromkeys(map(shown_site, summary.sites)):
        rows = [s for s in summary.sites if shown_site(s) == site]
        counts = [spread([getattr(r, field) for r in rows])
                  for field in ("art_steps", "urt_steps", "sweep_rotations", "int8_inputs")]
        size = f"{rows[0].k1}x{rows[0].k2}"
        balance = "yes" if rows[0].balanced else "no"
        print(f"            {site:<9} {size:<9} {balance:>7}   {counts[0]:>9}   {counts[1]:>13}   "
              f"{counts[2]:>15}   {counts[3]:>12}")
    borrowed = sum(s.borrowed for s in summary.sites)
    if borrowed:
        print(f"experts     {borrowed} sites of experts saw fewer than {FEW_TOKENS} tokens: they "
              "were calibrated on those of all experts of their layer")
    if config.scheme == "w4a4":
        print("hint        --scheme w4a8 is much closer to the original and, on most CPUs, as fast")


def shown_site(counts) -> str:
    """The site's name; one for all experts: "gate_up.*"."""
    name, dot, _ = counts.site.partition(".")
    return f"{name}{dot and '.*'}"


def spread(values: Sequence[int]) -> str:
    """'7' or '3-9'."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
