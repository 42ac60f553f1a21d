# SPDX-License-Identifier: Apache-2.0
"""The command `inspect`: outliers before and after each step."""

from __future__ import annotations

import argparse
import dataclasses

from ..config import SCHEMES, QuantConfig
from ..methods.registry import METHODS
from .shared import add_calibration, add_command, add_dequantize, progress_bar, some_path


def add(commands) -> None:
    """Add the command to the parser's."""
    defaults = QuantConfig()
    c = add_command(commands, "inspect", run,
                     "Outliers of every site before and after each step of its transformation.")
    c.add_argument("model", metavar="MODEL_OR_OUT", type=some_path)
    c.add_argument("--original", type=some_path, metavar="MODEL",
                   help="the model that OUT was made of; needed with a packed folder, which must "
                        "be of a method that folds nothing into the weights (not "
                        f"{', '.join(m.name for m in METHODS.values() if m.folds)})")
    c.add_argument("--method", choices=[m.name for m in METHODS.values() if not m.residual],
                   nargs="+", action="extend",
                   help=f"transformations to solve, one or more (default {defaults.method}; a "
                        "packed folder has its own)")
    c.add_argument("--scheme", choices=[s for s, bits in SCHEMES.items() if bits < 16],
                   help=f"bits of the activations (default {defaults.scheme}, or OUT's)")
    c.add_argument("--clip", type=float, metavar="R",
                   help="share of a token's largest activation that the codes reach")
    add_calibration(c)
    c.add_argument("--calibration-tokens", type=int, metavar="N",
                   help=f"default {defaults.calibration_tokens}, or OUT's")
    c.add_argument("--layer", type=int, metavar="I", help="this layer alone, from 0")
    c.add_argument("--site", metavar="NAME", help="this site alone, such as qkv or down")
    c.add_argument("--massive", type=float, nargs="+", metavar="T",
                   help="count entries beyond T times the median (default 100 1000)")
    c.add_argument("--normal", type=float, metavar="T",
                   help="count channels beyond T times the token's rms (default 6) in 6 %% of the "
                        "tokens")
    c.add_argument("--picture", type=some_path, metavar="FILE",
                   help="heat maps of the peaks and bars of the errors")
    c.add_argument("--surface", type=some_path, metavar="FILE",
                   help="|activation| over tokens and channels in 3-D, of the site whose peak is "
                        "largest among those asked for")
    c.add_argument("--html", type=some_path, metavar="PAGE",
                   help="all of it as one web page, which needs no other file")
    add_dequantize(c)
    c.add_argument("--csv", type=some_path, metavar="FILE", help="every row and figure")
    c.add_argument("--json", action="store_true", help="print JSON alone")


def run(arguments: argparse.Namespace) -> None:
    """What the parsed command line asks for."""
    from .. import files
    from ..checkpoint.folder import load_checkpoint
    from ..study import inspect as outliers

    for picture in (arguments.picture, arguments.surface):
        if picture is not None:
            files.check_picture(picture)
    if arguments.csv is not None:
        files.check_file(arguments.csv)
    if arguments.html is not None:
        files.check_page(arguments.html)
    names = ("scheme", "clip", "calibration_tokens")
    given = {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}
    model = load_checkpoint(arguments.model, arguments.dequantize)
    original = arguments.original
    if original is not None and model.quantized:
        original = load_checkpoint(original, arguments.dequantize)
    config = outliers.own_config(model)
    thresholds = {n: getattr(arguments, n) for n in ("massive", "normal")
                  if getattr(arguments, n) is not None}
    with progress_bar("inspecting", "layer") as update:
        result = outliers.inspect_model(
            model, arguments.method, original,
            dataclasses.replace(config, **given), arguments.calibration, arguments.layer,
            arguments.site, **thresholds, progress=update,
            surface=arguments.surface is not None or arguments.html is not None)
    if arguments.csv is not None:
        files.write_file(arguments.csv, result.to_csv())
    if arguments.picture is not None:
        files.save_figure(outliers.plot_overview(result), arguments.picture)
    if arguments.surface is not None:
        files.save_figure(outliers.plot_surface(result), arguments.surface)
    if arguments.html is not None:
        result.to_html(arguments.html)
    if arguments.json:
        print(files.json_text(result.to_json()))
        return
    print_inspection(result)


def print_inspection(result) -> None:
    """The table of sites, that of steps, and what the columns are."""
    from ..rotations import factors_text, poor_factors
    from ..study.inspect import site_table, step_table

    print(f"{result.model}: {result.bits}-bit activations, clip {result.clip:g}, weights "
          f"{result.weights}, {result.calibration_tokens} calibration tokens\n")
    print(site_table(result))
    print("\nafter each step: means over the layers, sums of MO and NO\n")
    print(step_table(result))
    factors = poor_factors({row.site: row.channels for row in result.rows})
    if factors:
        print(f"\nno short factors: {factors_text(factors)}: rotated less well and more slowly")
    print(f"""
MO>T         entries beyond T times the median magnitude; largest: the largest over the median
NO           channels beyond {result.normal:g} x the token's rms in {result.normal_share:.0%} of \
the tokens
utilization  entropy of the codes / {result.bits} bits; fill: mean|x| / (max / 2)
errors       relative, squared: of the quantized activations; of the linears' outputs
balance dB   predicted gain of the outputs' signal over noise by the rms balance; behind a Hadamard
align dB     the same by aligning activations and weights, of which a balance is the diagonal""")
