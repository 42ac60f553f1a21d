# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with other weights in its linears: what training leaves to be rounded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..tensors import TensorInfo
from ..weights import LayerWeights
from .views import View

__all__ = ["TrainedCheckpoint"]


@dataclass(frozen=True, eq=False, repr=False)
class TrainedCheckpoint(View):
    """An unquantized Checkpoint whose linears have the weights of a mapping, in float32.

    It takes a Checkpoint's place as the other views do. ValueError when the checkpoint is packed or
    a weight's shape is not the linear's.
    """

    source: Any  # the Checkpoint
    weights: Mapping[str, NDArray[np.float32]]  # by linear, without .weight: [n, k]
    seconds: float = 0.0  # what training took

    def __post_init__(self) -> None:
        self.source.require_unquantized()
        shapes = dict(self.spec.tensors())
        for name, weight in self.weights.items():
            expected = shapes.get(f"{name}.weight")
            if weight.shape != expected or weight.dtype != np.float32:
                raise ValueError(f"{name}: expected float32 {expected}, "
                                 f"found {weight.dtype} {weight.shape}")

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Type and size of the tensors by name; the trained ones are float32."""
        return self._infos({f"{name}.weight": "F32" for name in self.weights})

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the source's fingerprint and the weights."""
        digest = hashlib.sha256(self.source.fingerprint.encode() + b"trained")
        for name in sorted(self.weights):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.weights[name]))
        return digest.hexdigest()

    def _layer(self, i: int) -> LayerWeights:
        source = self.source.layer(i)
        linears = {
            role: replace(linear, weight=self.weights[linear.name])
            if linear.name in self.weights else linear
            for role, linear in source.linears.items()
        }
        return replace(source, linears=linears)

    def __repr__(self) -> str:
        return f"TrainedCheckpoint({self.source!r}, {len(self.weights)} linears)"
