# SPDX-License-Identifier: Apache-2.0
"""The table of formats for other programs: one row each, and the module that writes it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")  # of the weights; the first is the default
FUSES = ("balance", "rotation")  # what `rotated` formats have in their weights, likewise


@dataclass(frozen=True)
class Format:
    """What the rest of the package must know of a format without importing it.

    The module has write(checkpoint, out, dtype, progress), or a function of another name: write an
    unquantized checkpoint, or a view of one, to `out`, whole or not at all. progress(layers done,
    layers) is called after each.
    """

    name: str
    summary: str  # one line of the formats table
    module: str  # "singlequant.export.hf"
    rotated: bool = False  # whether balances or rotations (FUSES) are put into the weights
    packed: bool = False  # whether it takes a packed checkpoint as it is, and keeps its codes
    activations: bool = False  # whether it says how activations are quantized
    function: str = "write"

    def write(self, *arguments: Any) -> None:
        """Call the module's function; the module is imported at the first call."""
        getattr(importlib.import_module(self.module), self.function)(*arguments)


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("hf", "a `save_pretrained` folder of 16- or 32-bit weights, with no rotation that "
               "runs beside them", "singlequant.export.hf"),
        Format("rotated-hf", "hf, with balances of all sites, or rotations of residual stream and "
               "value heads, inside the weights: input for other quantizers",
               "singlequant.export.hf", rotated=True),
        Format("gguf", "a GGUF file of 16- or 32-bit weights, for llama.cpp",
               "singlequant.export.gguf"),
        Format("gguf-blocks", "a GGUF file of the packed codes, in llama.cpp's blocks Q4_0, Q5_0 "
               "and Q8_0", "singlequant.export.gguf", packed=True, function="write_blocks"),
        Format("compressed-tensors", "a folder of the packed codes as vLLM and transformers read "
               "them: pack-quantized of W4A16, int-quantized of W4A8",
               "singlequant.export.compressed", packed=True, activations=True),
        Format("gptq", "a folder of the packed codes of W4A16 in GPTQ's layout",
               "singlequant.export.gptq", packed=True),
        Format("awq", "a folder of the packed codes of W4A16 in AutoAWQ's gemm layout",
               "singlequant.export.awq", packed=True),
        Format("flatquant", "a folder of the packed codes of W4A4 with left and right factors, as "
               "vLLM-Ascend's W4A4_FLATQUANT_DYNAMIC reads it", "singlequant.export.flatquant",
               packed=True, activations=True),
    )
}


def find_format(name: Any) -> Format:
    """The row of that name. ValueError lists the names."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, found {name!r}")
    return FORMATS[name]


def check_fuse(name: Any) -> None:
    """ValueError unless `rotated` formats know it."""
    if name not in FUSES:
        raise ValueError(f"fuse: expected one of {', '.join(FUSES)}, found {name!r}")


def check_dtype(name: Any) -> None:
    """ValueError unless weights can be written in that type."""
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, found {name!r}")
