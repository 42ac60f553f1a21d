# SPDX-License-Identifier: Apache-2.0
"""KurTail, a baseline: Akhondzadeh et al., arXiv 2503.01483: rotations of least kurtosis.

R1 rotates the residual stream and R2 of each layer its value heads, both inside the weights; the
inputs of down take an online Hadamard. Both minimise the kurtosis of the rotated activations, whose
lower end is a uniform distribution's. The paper does so by gradient steps on the orthogonal group.
The kurtosis of rows of equal root mean square is their mean fourth power, and the rotation of two
channels that makes it least has a closed form (docs/rotations.md): uniformity sweeps minimise the
same objective here, without a gradient.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..checkpoint.views import ResidualCheckpoint
from ..config import QuantConfig
from .axes import factor_bytes as online_bytes
from .spinquant import build
from .stream import StreamSamples, rotated_checkpoint

__all__ = ["ROUNDS", "build", "least_kurtosis", "online_bytes", "prepare"]

ROUNDS = 3  # sweeps over all pairs of channels; later ones lower the kurtosis by 2 % at most


def least_kurtosis(x: NDArray[np.float32], start: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rotation R [n, n] that sweeps find from `start`: the fourth powers of x R fall."""
    found, columns = start, np.ascontiguousarray((x @ start).T)
    for _ in range(ROUNDS):
        pairs, angles, columns = _C.uniformity_sweep(columns, 1)
        found = _C.chain_apply(pairs, angles, found)  # rows of R, as rows of x R
    return found


def prepare(checkpoint, config: QuantConfig, samples: StreamSamples) -> ResidualCheckpoint:
    """The checkpoint with R1 and R2 of the recorded samples in its weights."""
    begin = time.perf_counter()
    return rotated_checkpoint(checkpoint, samples, least_kurtosis, config.seed, begin)
