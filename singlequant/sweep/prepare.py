# SPDX-License-Identifier: Apache-2.0
"""What a method does before the first layer, and to each layer: the view and the rotations."""

from __future__ import annotations

import numpy as np

from ..checkpoint.folder import Checkpoint
from ..checkpoint.trained import TrainedCheckpoint
from ..checkpoint.views import ResidualCheckpoint, ValueCheckpoint
from ..config import QuantConfig
from ..methods.registry import METHODS
from ..methods.solve import solve_layer
from ..rotations import LayerRotations
from ..rows import require_finite
from ..statistics import LayerStatistics
from .samples import stream_samples

View = Checkpoint | ResidualCheckpoint | TrainedCheckpoint | ValueCheckpoint


def prepare(checkpoint: Checkpoint, config: QuantConfig, windows: np.ndarray) -> View:
    """The checkpoint as config sees it: with a rotated residual stream, trained, or as it is.

    With kv_bits below 16 its value heads are rotated in any case: by the method, or by a Hadamard.
    windows: the calibration tokens, which a method may learn on.
    """
    method = METHODS[config.method]
    if method.residual or method.trains:
        given = stream_samples(checkpoint, windows) if method.samples else windows
        return method.implementation().prepare(checkpoint, config, given)
    rotates = all("v" in kind.linears and not kind.attention.qkv_clip
                  for kind in checkpoint.spec.kinds)
    return ValueCheckpoint(checkpoint) if config.kv_bits < 16 and rotates else checkpoint


def solve(view: View, statistics: LayerStatistics, config: QuantConfig) -> LayerRotations:
    """One layer's transformations under config, for statistics of what `prepare` returned."""
    return solve_layer(statistics, config)


def check_outer(checkpoint: Checkpoint) -> None:
    """ValueError when a tensor outside the layers holds NaN or Inf."""
    for name, tensor in checkpoint.outer.items():
        require_finite(tensor, name)
