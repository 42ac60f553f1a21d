# SPDX-License-Identifier: Apache-2.0
"""A folder opened to run."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.folder import load_checkpoint
from .model import Model


def load(
    path: str | Path, kv_bits: int | None = None, dequantize: bool = False,
    kv_dtype: str | None = None,
) -> Model:
    """A folder, quantized or not, ready to run. FormatError names what is wrong with it.

    kv_bits, kv_dtype: of cached keys and values in place of the folder's own; see `Model`.
    dequantize: as for `load_checkpoint`.
    """
    return Model(load_checkpoint(path, dequantize), kv_bits, kv_dtype=kv_dtype)
