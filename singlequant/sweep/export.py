# SPDX-License-Identifier: Apache-2.0
"""A model in the formats of other programs: `export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.folder import Checkpoint, open_model
from ..checkpoint.unpacked import UnpackedCheckpoint
from ..export.folder import check_out
from ..export.formats import DTYPES, FUSES, Format, check_dtype, check_fuse, find_format
from ..methods.quarot import quarot_checkpoint
from ..methods.registry import METHODS
from .balanced import balanced_checkpoint


def export(
    folder: str | Path | Checkpoint,
    to: str,
    output: str | Path,
    *,
    dtype: str = DTYPES[0],
    seed: int = 0,
    fuse: str = FUSES[0],
    calibration: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    calibrating: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a model in a format that other programs open, and return its path.

    folder: a packed folder, whose weights are dequantized and turned back, or a model that is not
    quantized. to: a format of docs/exports.md. output: the new folder. dtype: of its weights,
    "bfloat16", "float16" or "float32". Activations are not quantized there.

    fuse: what `rotated-hf` puts into the weights. "balance" takes balances of all sites, which
    make 4-bit blocks of others closer; they are found on a calibration text, see
    `calibration_windows`. "rotation" takes a Hadamard of the residual stream and of value heads,
    which spreads outliers of activations. seed: of the calibration windows, or of the signs of the
    Hadamard. calibrating(layers done, layers): called after each layer that calibration passed.

    One layer is in memory at a time. `output` appears only when it is whole. ValueError for a
    format or a type that there is none of, and for a model that the format cannot hold.
    FileExistsError if `output` exists.
    """
    row = find_format(to)
    check_dtype(dtype)
    check_fuse(fuse)
    checkpoint, out = open_model(folder), Path(output)
    check_out(out, checkpoint.path)
    row.write(_taken(row, checkpoint, seed, fuse, calibration, calibrating), out, dtype, progress)
    return out


def _taken(
    row: Format, checkpoint: Checkpoint, seed: int, fuse: str, calibration: str | Path | None,
    calibrating: Callable[[int, int], None] | None,
) -> Any:
    """The checkpoint, or the view of it, that a format takes."""
    if row.packed:
        return checkpoint
    plain: Any = UnpackedCheckpoint(checkpoint) if checkpoint.quantized else checkpoint
    if not row.rotated:
        return plain
    if fuse == "balance":
        return balanced_checkpoint(plain, calibration, seed, calibrating)
    return plain if _is_rotated(checkpoint) else quarot_checkpoint(plain, seed)


def _is_rotated(checkpoint: Checkpoint) -> bool:
    """Whether the method of a packed folder has rotated the residual stream already."""
    config = checkpoint.quant_config
    return config is not None and METHODS[config.method].residual
