# SPDX-License-Identifier: Apache-2.0
"""What a method does before the first layer, and to each layer: the view and the rotations."""

from __future__ import annotations

import numpy as np

from ..checkpoint.folder import Checkpoint
from ..checkpoint.views import ResidualCheckpoint, ValueCheckpoint
from ..config import QuantConfig
from ..methods.registry import METHODS
from ..methods.solve import solve_layer
from ..rotations import LayerRotations
from ..rows import require_finite
from ..statistics import LayerStatistics
from ..weights import norm_tensors

View = Checkpoint | ResidualCheckpoint | ValueCheckpoint


def prepare(checkpoint: Checkpoint, config: QuantConfig, windows: np.ndarray) -> View:
    """The checkpoint as config sees it: with its residual stream rotated, or as it is.

    With kv_bits below 16 its value heads are rotated in any case: by the method, or by a Hadamard.
    windows: the calibration tokens, which a method may learn on.
    """
    method = METHODS[config.method]
    if method.residual:
        return method.implementation().prepare(checkpoint, config, windows)
    return checkpoint if config.kv_bits == 16 else ValueCheckpoint(checkpoint)


def solve(view: View, statistics: LayerStatistics, config: QuantConfig) -> LayerRotations:
    """One layer's transformations under config, for statistics of what `prepare` returned."""
    return solve_layer(statistics, config)


def check_outer(checkpoint: Checkpoint) -> None:
    """ValueError when the embedding, the last norm or the head holds NaN or Inf."""
    spec = checkpoint.spec
    require_finite(checkpoint.embedding, f"{spec.embed}.weight")
    for name, tensor in norm_tensors(checkpoint.final_norm).items():
        require_finite(tensor, name)
    if not spec.tied:
        require_finite(checkpoint.head, f"{spec.head}.weight")
