# SPDX-License-Identifier: Apache-2.0
"""A rotation of the core as named arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C

Arrays = Mapping[str, NDArray[Any]]

FACTORS = ("rotation_left", "rotation_right")
CHAIN = ("_chain", "_pairs", "_angles")  # of a factor that is no matrix
ALIGN = "rotation_align"
BLOCKS = ("rotation_first", "rotation_permutation", "rotation_second")
NAMES = (*FACTORS, *(name + end for name in FACTORS for end in CHAIN), ALIGN, *BLOCKS)


def rotation_arrays(rotation: _C.Rotation | None) -> dict[str, NDArray[Any]]:
    """The arrays of a rotation by name, as `_C.Rotation` takes them; empty for None."""
    if rotation is None:
        return {}
    if rotation.kind == "blocks":
        return dict(zip(BLOCKS, rotation.parts, strict=True))
    found: dict[str, NDArray[Any]] = {}
    for name, part in zip((*FACTORS, ALIGN), rotation.parts, strict=False):
        if isinstance(part, tuple):
            order, hadamard, pairs, angles = part
            chain = np.array([order, hadamard], np.int64), pairs, angles
            found |= {name + end: array for end, array in zip(CHAIN, chain, strict=True)}
        elif part is not None:
            found[name] = part
    return found


def rotation_of(k: int, arrays: Arrays) -> _C.Rotation | None:
    """The rotation of k inputs that `rotation_arrays` gave; ValueError if the arrays make none."""
    if not set(NAMES) & set(arrays):
        return None
    if BLOCKS[0] in arrays:
        return _C.Rotation.blocks(*(_part(arrays, name) for name in BLOCKS))
    parts = [_factor(arrays, name) for name in FACTORS]
    return _C.Rotation(k, *parts, arrays.get(ALIGN))


def _factor(arrays: Arrays, name: str) -> Any:
    """A factor as `_C.Rotation` takes it: a matrix, a chain or None."""
    if name + CHAIN[0] not in arrays:
        return arrays.get(name)
    chain, pairs, angles = (_part(arrays, name + end) for end in CHAIN)
    if chain.shape != (2,):
        raise ValueError(f"{name}{CHAIN[0]}: expected 2 integers, found shape {chain.shape}")
    order, hadamard = chain.tolist()
    return order, bool(hadamard), pairs, angles


def _part(arrays: Arrays, name: str) -> NDArray[Any]:
    if name not in arrays:
        raise ValueError(f"{name}: expected it beside the rotation's other arrays, found none")
    return arrays[name]
