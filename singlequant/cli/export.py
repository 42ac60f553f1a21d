# SPDX-License-Identifier: Apache-2.0
"""The command `export`: a model in, a folder that other programs open out."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..export.formats import DTYPES, FORMATS
from .shared import add_command, add_dequantize, progress_bar


def add(commands) -> None:
    """Add the command to the parser's."""
    c = add_command(commands, "export", run,
                    "Write a packed folder in a format that other programs open.")
    c.add_argument("model", metavar="MODEL_OR_OUT", type=Path)
    c.add_argument("--to", choices=FORMATS, required=True,
                   help="; ".join(f"{row.name} = {row.summary}" for row in FORMATS.values()))
    c.add_argument("--output", metavar="DIR", type=Path, required=True, help="the new folder")
    c.add_argument("--dtype", choices=DTYPES, default=DTYPES[0],
                   help=f"of the weights (default {DTYPES[0]})")
    c.add_argument("--seed", type=int, default=0, metavar="N",
                   help="of the rotation of rotated-hf (default 0)")
    add_dequantize(c)


def run(arguments: argparse.Namespace) -> None:
    """What the parsed command line asks for."""
    from ..checkpoint.folder import load_checkpoint
    from ..files import folder_bytes
    from ..sweep.export import export

    model = load_checkpoint(arguments.model, arguments.dequantize)
    with progress_bar("exporting", "layer") as update:
        out = export(model, arguments.to, arguments.output, dtype=arguments.dtype,
                     seed=arguments.seed, progress=update)
    print(f"{out}: {arguments.to}, {arguments.dtype}")
    print(f"size        {model.bytes_with_tokenizer / 1e6:.1f} -> {folder_bytes(out) / 1e6:.1f} MB")
    rounded = model.quantized and model.quant_config.activation_bits < 16
    if rounded and not FORMATS[arguments.to].activations:
        print(f"activations {model.quant_config.activation_bits} bits -> not quantized: other "
              "programs know no such sites")
