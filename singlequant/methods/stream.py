# SPDX-License-Identifier: Apache-2.0
"""Rotations of the residual stream and of value heads that are found from recorded activations."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..checkpoint.views import DenseRotation, ResidualCheckpoint

ROWS_PER_CHANNEL = 16  # at 4 of them a rotation flattens its sample far below a uniform's kurtosis
ELEMENTS_MAX = 1 << 25  # of a sample: 256 MiB while it is rotated in float64

Find = Callable[[NDArray[np.float32], NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True, eq=False, repr=False)
class StreamSamples:
    """Recorded activations, each row over its root mean square.

    residual: what attention and MLP of all layers read, before the norms' weights. values: by
    layer, value heads as o reads them.
    """

    residual: NDArray[np.float32]  # [rows, hidden]
    values: tuple[NDArray[np.float32], ...]  # [rows, head_dim] each

    @staticmethod
    def rows_wanted(hidden: int) -> int:
        """Rows of `residual` for a rotation of so many channels: with few of them it overfits."""
        return min(max(4096, ROWS_PER_CHANNEL * hidden), ELEMENTS_MAX // hidden)


def unit_rows(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of x [rows, n] over their root mean squares; those of zeros are left out."""
    rms = np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True))
    live = rms[:, 0] > 0
    return (x[live] / rms[live]).astype(np.float32)


def rotated_checkpoint(
    checkpoint, samples: StreamSamples, find: Find, seed: int, begin: float
) -> ResidualCheckpoint:
    """The checkpoint whose residual stream and value heads take the rotations of find(x, start).

    They start from randomized Hadamards of the seed. begin: time.perf_counter() when it was asked
    for. ValueError where a norm does not commute with a rotation.
    """
    spec = checkpoint.spec
    start = [_randomized_hadamard(order, [seed, i])
             for i, order in enumerate([spec.hidden, *[spec.attention.head_dim] * spec.layers])]
    r1 = find(samples.residual, start[0])
    r2 = np.stack([find(x, r) for x, r in zip(samples.values, start[1:], strict=True)])
    seconds = time.perf_counter() - begin
    return ResidualCheckpoint(checkpoint, DenseRotation(r1, "r1"), r2, seconds)


def _randomized_hadamard(order: int, seed: list[int]) -> NDArray[np.float64]:
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], order)
    return _C.hadamard_transform(np.diag(signs))
