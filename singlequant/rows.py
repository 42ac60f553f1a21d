# SPDX-License-Identifier: Apache-2.0
"""Rows of weights and activations in float32, a block at a time, checked and rotated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _C
from .rotations import BlockRotation, Factor, SiteRotation

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


class TurnBack:
    """Rows that meet a site's rotated inputs x' become rows that meet its inputs x.

    x' = x A, so that x' W'^T = x (W' A^T)^T: a row w' becomes w' A^T. The product stays whether A
    is orthogonal or not.
    """

    def __init__(self, rotation: _C.Rotation) -> None:
        self._k = rotation.k
        self._axes: tuple[NDArray[np.float32] | None, ...] = ()  # of factors that are no matrices
        if rotation.kind == "blocks":  # of x first, then permuted, then second
            first, permutation, second = rotation.parts
            order = np.argsort(permutation).astype(np.int32)
            self._steps = [_C.Rotation.blocks(_transposed(second), order, _transposed(first))]
            return
        left, right, *align = rotation.parts
        self._steps = []
        if isinstance(left, tuple) or isinstance(right, tuple):
            self._axes = factor_matrix(left), factor_matrix(right)
        elif left is not None or right is not None:
            sides = (None if side is None else _transposed(side) for side in (left, right))
            self._steps.append(_C.Rotation(rotation.k, *sides))
        self._steps += [_C.Rotation(rotation.k, align=_transposed(blocks)) for blocks in align]

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """w' A^T of each row w' [n, k]."""
        if self._axes:
            rows = self._by_axes(rows)
        for step in self._steps:
            rows = _C.rotate(rows, step)
        return rows

    def _by_axes(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """L^T X R of each row as X [k1, k2], whose A makes L X R^T of it."""
        left, right = self._axes
        k1 = self._k // len(right) if left is None else len(left)
        x = rows.reshape(len(rows), k1, -1)
        x = x if right is None else x @ right
        x = x if left is None else left.T @ x
        return np.ascontiguousarray(x).reshape(rows.shape)


def factor_matrix(part: NDArray[np.float32] | tuple[Any, ...] | None) -> NDArray[np.float32] | None:
    """A factor as _C.Rotation holds it, as a matrix; None for the identity."""
    if isinstance(part, tuple):
        return Factor(*part).matrix().astype(np.float32)
    return part


def _transposed(part: NDArray[np.float32]) -> NDArray[np.float32]:
    """A matrix, or each of a row of blocks, transposed."""
    return np.ascontiguousarray(part.swapaxes(-1, -2))
