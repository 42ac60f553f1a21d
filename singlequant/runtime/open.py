# SPDX-License-Identifier: Apache-2.0
"""A folder opened to run."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.folder import load_checkpoint
from .model import Model


def load(path: str | Path, kv_bits: int | None = None) -> Model:
    """A folder, quantized or not, ready to run. FormatError names what is wrong with it.

    kv_bits: bits of cached keys and values in place of the folder's own; see `Model`.
    """
    return Model(load_checkpoint(path), kv_bits)
