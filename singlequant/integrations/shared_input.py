# SPDX-License-Identifier: Apache-2.0
"""Linears that read one tensor and turn it alike rotate and quantize it once."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import _C
from .rotation_state import NAMES, rotation_of


class Turn:
    """A rotation, and the modules that have it."""

    def __init__(self, core: _C.Rotation) -> None:
        self.core = core
        self.users: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


_turns: weakref.WeakValueDictionary[bytes, Turn] = weakref.WeakValueDictionary()


def turn_of(k: int, arrays: Mapping[str, NDArray[Any]], user: torch.nn.Module) -> Turn | None:
    """The rotation of k inputs among a linear's arrays, one object for all with equal arrays; None
    where there is none. ValueError if the arrays make none."""
    core = rotation_of(k, arrays)
    if core is None:
        return None
    digest = hashlib.blake2b(str(k).encode())
    for name in NAMES:
        if name in arrays:
            digest.update(f"{name} {arrays[name].shape}".encode())
            digest.update(np.ascontiguousarray(arrays[name]))
    turn = _turns.setdefault(digest.digest(), Turn(core))
    turn.users.add(user)
    return turn


class _Prepared:
    """The activations of a tensor. They go when the tensor goes."""

    def __init__(self, x: torch.Tensor, values: NDArray[np.float32], key: Any) -> None:
        turn, bits, clip, int8_inputs = key
        self.key, self.version = key, _version(x)
        # Nothing counts the changes of an inference tensor.
        self.values = values.copy() if self.version is None else None
        self.activations: _C.Activations | None = _C.Activations(
            values, bits, clip, turn.core, int8_inputs)
        prepared = weakref.ref(self)  # a strong one would be a circle
        self.tensor = weakref.ref(x, lambda _: _forget(prepared()))

    def is_of(self, x: torch.Tensor, values: NDArray[np.float32], key: Any) -> bool:
        """Whether it is what such a call would make."""
        if self.tensor() is not x or self.key != key or self.version != _version(x):
            return False
        # Bit for bit: a NaN is to be found again.
        return self.values is None or np.array_equal(self.values.view(np.int32),
                                                     values.view(np.int32))


def _forget(prepared: _Prepared | None) -> None:
    if prepared is not None:
        prepared.activations = prepared.values = None


class _Last(threading.local):
    prepared: _Prepared | None = None


_last = _Last()


def prepare(
    x: torch.Tensor, values: NDArray[np.float32], turn: Turn, bits: int, clip: float,
    int8_inputs: int,
) -> _C.Activations:
    """The activations of values, which are x's: those of the call before, if it was the same."""
    key = turn, bits, clip, int8_inputs
    prepared = _last.prepared
    if prepared is None or not prepared.is_of(x, values, key):
        _last.prepared = prepared = _Prepared(x, values, key)
    return prepared.activations


def _version(x: torch.Tensor) -> int | None:
    """How often a tensor was changed; None where that is not counted."""
    return None if x.is_inference() else x._version
