# SPDX-License-Identifier: Apache-2.0
"""SpinQuant, a baseline: Liu et al., arXiv 2405.16406, whose rotations are learned.

R1 [hidden, hidden] rotates the residual stream, R2 [head_dim, head_dim] of each layer its value
heads; both are fused into the weights (checkpoint/views.py). Learning them needs the `torch` extra
(spinquant_learn.py). down_proj's input takes a fixed online Hadamard (R4). There is no R3: it would
rotate queries and keys, whose cache the published method quantizes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..checkpoint.views import DenseRotation, ResidualCheckpoint
from ..config import QuantConfig
from ..models.spec import ModelSpec
from ..rotations import LayerRotations, SiteRotation
from .axes import Site, factor_bytes as online_bytes
from .quarot import online_hadamard
from .spinquant_learn import (
    NOISE_ANGLE,
    STEPS,
    Learned,
    learn_rotations,
    load_learned,
    randomized_hadamard,
    save_learned,
    starting_rotations,
)

__all__ = [
    "NOISE_ANGLE",
    "STEPS",
    "Learned",
    "build",
    "learn_rotations",
    "load_learned",
    "online_bytes",
    "online_rotations",
    "prepare",
    "randomized_hadamard",
    "save_learned",
    "spinquant_checkpoint",
    "starting_rotations",
]

DEFAULT_STEPS = 100  # of a quantization that learns them, as published


def spinquant_checkpoint(
    checkpoint, r1: NDArray[np.floating], r2: NDArray[np.floating], seconds: float = 0.0
) -> ResidualCheckpoint:
    """SpinQuant's fused part: learned r1 [hidden, hidden] and r2 [layers, head_dim, head_dim].

    seconds: what learning them took. ValueError unless they are orthogonal and of these sizes.
    """
    return ResidualCheckpoint(checkpoint, DenseRotation(r1, "r1"), r2, seconds)


def prepare(checkpoint, config: QuantConfig, windows: NDArray[np.int64]) -> ResidualCheckpoint:
    """The checkpoint with its fused part: of the file config.learned, or learned on the windows.

    ImportError without torch where they are to be learned; ValueError when the file is of another
    model.
    """
    if config.learned is not None:
        learned = load_learned(config.learned)
    else:
        try:
            learned = learn_rotations(
                checkpoint, windows, DEFAULT_STEPS, seed=config.seed,
                clip=config.activation_clip, activation_bits=config.activation_bits,
            )
        except ModuleNotFoundError as error:
            raise ImportError(f"method spinquant learns its rotations with torch: pip install "
                              f"'singlequant[torch]', or name a file of them ({error})") from None
    try:
        return spinquant_checkpoint(checkpoint, learned.R1, learned.R2, sum(learned.seconds))
    except ValueError as error:
        raise ValueError(f"{config.learned or 'learned rotations'}: {error}") from None


def build(site: Site) -> SiteRotation:
    """The online Hadamard of the inputs of what reads the MLP (R4)."""
    return online_hadamard(site.k1, site.k2)


def online_rotations(spec: ModelSpec, layer: int) -> LayerRotations:
    """What one layer rotates at inference, without statistics: the inputs that read the MLP."""
    return LayerRotations(layer, {
        name: online_hadamard(*_C.factor_sizes(site.k))
        for name, site in spec.layer(layer).sites.items() if site.reads == "mlp"
    })
