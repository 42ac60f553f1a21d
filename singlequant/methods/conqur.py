# SPDX-License-Identifier: Apache-2.0
"""ConQuR, a baseline: Thrash et al., arXiv 2605.10793: rotations onto the corners of a cube.

R1 rotates the residual stream and R2 of each layer its value heads, both inside the weights; the
inputs of down take an online Hadamard. A rotation maximises the agreement of the normalized
activations x R with the nearest corners sign(x R) / sqrt(n) of the inscribed hypercube, which is
their l1 norm. With the corners held fixed that is an orthogonal Procrustes problem: R = U V^T for
the singular value decomposition U S V^T of the sum of x^T sign(x R). Corners and R are updated in
turn; the norm never falls. The paper updates R as batches pass by; here one recorded sample is
gone over again.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.views import ResidualCheckpoint
from ..config import QuantConfig
from .axes import factor_bytes as online_bytes
from .spinquant import build
from .stream import StreamSamples, rotated_checkpoint

__all__ = ["UPDATES", "build", "corner_rotation", "online_bytes", "prepare"]

UPDATES = 10  # of corners and rotation; ten more raise the norm by 0.2 %


def corner_rotation(x: NDArray[np.float32], start: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rotation R [n, n] that alternating updates find from `start`: |x R|_1 grows."""
    found = start
    for _ in range(UPDATES):
        corners = np.sign(x @ found.astype(np.float32))
        u, _, vt = np.linalg.svd((x.T @ corners).astype(np.float64))
        found = u @ vt
    return found


def prepare(checkpoint, config: QuantConfig, samples: StreamSamples) -> ResidualCheckpoint:
    """The checkpoint with R1 and R2 of the recorded samples in its weights."""
    begin = time.perf_counter()
    return rotated_checkpoint(checkpoint, samples, corner_rotation, config.seed, begin)
