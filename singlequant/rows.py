# SPDX-License-Identifier: Apache-2.0
"""Rows of weights and activations in float32, a block at a time, checked and rotated."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _C
from .rotations import BlockRotation, SiteRotation

ROWS_PER_BLOCK = 1024  # rows of a weight in float32 at a time: the sweep's working memory


def rotate_rows(
    x: NDArray[np.floating], rotation: SiteRotation | BlockRotation
) -> NDArray[np.float32]:
    """Each row of x [..., k], a token or a weight's, as the site's rotation turns it."""
    return _C.rotate(x, rotation.core)


def token_ids(tokens: ArrayLike, name: str) -> NDArray[np.int64]:
    """Token ids as they are, int64 [...]. ValueError `name: ...` for anything but integers."""
    ids = np.asarray(tokens)
    if not ids.size and ids.dtype == np.float64:  # of an empty list
        return ids.astype(np.int64)
    if ids.dtype.kind not in "iu" or (ids.dtype == np.uint64 and ids.max(initial=0) >> 63):
        found = f"{ids.dtype}" if ids.dtype.kind != "O" else f"{tokens!r:.80}"
        raise ValueError(f"{name}: expected integers, the ids of tokens, found {found}")
    return ids.astype(np.int64, copy=False)


def float32_blocks(array: NDArray, name: str) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield (rows, block): a weight of any stored type, ROWS_PER_BLOCK rows at a time in float32.

    ValueError `name, rows a to b: ...` when a block holds NaN or Inf.
    """
    matrix = array.reshape(len(array), -1)
    for first in range(0, len(matrix), ROWS_PER_BLOCK):
        rows = slice(first, min(first + ROWS_PER_BLOCK, len(matrix)))
        try:
            block = _C.to_float32(matrix[rows], reject=True)
        except ValueError as error:
            raise ValueError(f"{name}, rows {first} to {rows.stop - 1}: {error}") from None
        yield rows, block


def require_finite(array: NDArray, name: str) -> None:
    """ValueError `name, rows a to b: ...` when a weight of any stored type holds NaN or Inf."""
    for _ in float32_blocks(array, name):
        pass
