# SPDX-License-Identifier: Apache-2.0
"""The command `export`: a model in, a folder that other programs open out."""

from __future__ import annotations

import argparse

from ..export.formats import DTYPES, FORMATS, FUSES
from .shared import add_calibration, add_command, add_dequantize, progress_bar, some_path


def add(commands) -> None:
    """Add the command to the parser's."""
    c = add_command(commands, "export", run,
                    "Write a packed folder in a format that other programs open.")
    c.add_argument("model", metavar="MODEL_OR_OUT", type=some_path)
    c.add_argument("--to", choices=FORMATS, required=True,
                   help="; ".join(f"{row.name} = {row.summary}" for row in FORMATS.values()))
    c.add_argument("--output", metavar="DIR", type=some_path, required=True, help="the new folder")
    c.add_argument("--dtype", choices=DTYPES, default=DTYPES[0],
                   help=f"of the weights (default {DTYPES[0]})")
    c.add_argument("--fuse", choices=FUSES, default=None,
                   help="what rotated-hf puts into the weights: balance = balances of all sites, "
                        "for 4-bit blocks of weights; rotation = Hadamards of residual stream and "
                        f"value heads, for rounded activations (default {FUSES[0]})")
    add_calibration(c)
    c.add_argument("--seed", type=int, default=0, metavar="N",
                   help="of rotated-hf's calibration windows or rotation (default 0)")
    add_dequantize(c)


def check_export(arguments: argparse.Namespace) -> None:
    """ValueError for options that the format, or what is fused, has no use for."""
    rotated = FORMATS[arguments.to].rotated
    if arguments.fuse is not None and not rotated:
        raise ValueError(f"--fuse: needs --to rotated-hf, found {arguments.to}")
    if arguments.calibration is not None and not (rotated and arguments.fuse != "rotation"):
        raise ValueError("--calibration: needs --to rotated-hf with --fuse balance")


def run(arguments: argparse.Namespace) -> None:
    """What the parsed command line asks for."""
    from ..checkpoint.folder import load_checkpoint
    from ..files import folder_bytes
    from ..sweep.export import export

    check_export(arguments)
    model = load_checkpoint(arguments.model, arguments.dequantize)
    with progress_bar("exporting", "layer") as update:
        out = export(model, arguments.to, arguments.output, dtype=arguments.dtype,
                     seed=arguments.seed, fuse=arguments.fuse or FUSES[0],
                     calibration=arguments.calibration, progress=update,
                     calibrating=update.part("calibrating", "layer"))
    print(f"{out}: {arguments.to}, {arguments.dtype}")
    print(f"size        {model.bytes_with_tokenizer / 1e6:.1f} -> {folder_bytes(out) / 1e6:.1f} MB")
    rounded = model.quantized and model.quant_config.activation_bits < 16
    if rounded and not FORMATS[arguments.to].activations:
        print(f"activations {model.quant_config.activation_bits} bits -> not quantized: other "
              "programs know no such sites")
