# SPDX-License-Identifier: Apache-2.0
"""What a method does before the first layer, and to each layer: the view and the rotations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..checkpoint.folder import Checkpoint
from ..checkpoint.views import (
    ResidualCheckpoint,
    ValueCheckpoint,
    online_rotations,
    quarot_checkpoint,
    spinquant_checkpoint,
)
from ..config import RESIDUAL_METHODS, QuantConfig
from ..methods.solve import solve_layer
from ..rotations import LayerRotations
from ..rows import require_finite
from ..statistics import LayerStatistics

View = Checkpoint | ResidualCheckpoint | ValueCheckpoint

SPINQUANT_STEPS = 100  # as published


def prepare(checkpoint: Checkpoint, config: QuantConfig, windows: np.ndarray) -> View:
    """The checkpoint as config sees it: with its residual stream rotated, or as it is.

    With kv_bits below 16 its value heads are rotated in any case: by the method, or by a Hadamard.
    spinquant learns its rotations here on the calibration windows, with torch, unless
    config.learned names a file of them. ValueError when that file is of another model.
    """
    if config.method == "quarot":
        return quarot_checkpoint(checkpoint, config.seed)
    if config.method != "spinquant":
        return checkpoint if config.kv_bits == 16 else ValueCheckpoint(checkpoint)
    from ..methods import spinquant  # imports torch only to learn

    if config.learned is not None:
        learned = spinquant.load_learned(config.learned)
    else:
        try:
            learned = spinquant.learn_rotations(
                checkpoint, windows, SPINQUANT_STEPS, seed=config.seed,
                clip=config.activation_clip, activation_bits=config.activation_bits,
            )
        except ModuleNotFoundError as error:
            raise ImportError(f"method spinquant learns its rotations with torch: pip install "
                              f"'singlequant[torch]', or name a file of them ({error})") from None
    try:
        return spinquant_checkpoint(checkpoint, learned.R1, learned.R2, sum(learned.seconds))
    except ValueError as error:
        raise ValueError(f"{config.learned or 'learned rotations'}: {error}") from None


def solve(view: View, statistics: LayerStatistics, config: QuantConfig) -> LayerRotations:
    """One layer's transformations under config, for what `prepare` returned."""
    if config.method in RESIDUAL_METHODS:
        rotations = online_rotations(view.shape, statistics.index, config.method)
        return replace(rotations, statistics=statistics)
    return solve_layer(statistics, config)


def check_outer(checkpoint: Checkpoint) -> None:
    """ValueError when the embedding, the last norm or the head holds NaN or Inf."""
    architecture = checkpoint.architecture
    require_finite(checkpoint.embedding, f"{architecture.embed}.weight")
    require_finite(checkpoint.final_norm, f"{architecture.final_norm}.weight")
    if not checkpoint.shape.tie_word_embeddings:
        require_finite(checkpoint.head, f"{architecture.head}.weight")
