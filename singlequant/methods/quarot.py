# SPDX-License-Identifier: Apache-2.0
"""QuaRot, a baseline: Ashkboos et al., arXiv 2404.00456.

A randomized Hadamard rotates the residual stream and a Hadamard each value head, both inside the
weights. Online, the inputs of o take a Hadamard across the heads, which with the one fused into
each value head is the Hadamard of all of o's inputs; down's take the Hadamard of their size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..checkpoint.views import RandomizedHadamard, ResidualCheckpoint
from ..config import QuantConfig
from ..models.spec import ModelSpec
from ..rotations import Factor, LayerRotations, SiteRotation, Step
from .axes import Site, factor_bytes as online_bytes

__all__ = ["build", "online_bytes", "online_rotations", "prepare", "quarot_checkpoint"]


def quarot_checkpoint(checkpoint, seed: int = 0) -> ResidualCheckpoint:
    """QuaRot's fused part: a randomized Hadamard on the residual stream, H on each value head."""
    spec = checkpoint.spec
    head = _C.hadamard_transform(np.eye(spec.attention.head_dim))
    values = np.broadcast_to(head, (spec.layers, *head.shape))
    return ResidualCheckpoint(checkpoint, RandomizedHadamard(spec.hidden, seed), values)


def prepare(checkpoint, config: QuantConfig, windows: NDArray[np.int64]) -> ResidualCheckpoint:
    """The checkpoint with its fused part, of config's seed; the windows are not looked at."""
    return quarot_checkpoint(checkpoint, config.seed)


def build(site: Site) -> SiteRotation:
    """The Hadamard across the heads where the site reads attention, of all its inputs elsewhere."""
    if site.statistics.reads != "attention":
        return online_hadamard(site.k1, site.k2)
    kv_heads, queries, head_dim = site.statistics.shared
    return heads_hadamard(kv_heads * queries, head_dim)


def online_hadamard(k1: int, k2: int) -> SiteRotation:
    """A Hadamard on both axes: the Kronecker product is one of k1 k2 inputs."""
    steps = (Step("Hadamard", 0, True), Step("Hadamard", 1, True))
    return SiteRotation(_hadamard(k1), _hadamard(k2), steps)


def heads_hadamard(heads: int, head_dim: int) -> SiteRotation:
    """A Hadamard across the heads."""
    return SiteRotation(_hadamard(heads), Factor.identity(head_dim), (Step("Hadamard", 0, True),))


def online_rotations(spec: ModelSpec, layer: int) -> LayerRotations:
    """What one layer rotates at inference, without statistics: what attention and the MLP give."""
    attention, sites = spec.layer(layer).attention, {}
    for name, site in spec.layer(layer).sites.items():
        if site.reads == "attention":
            sites[name] = heads_hadamard(attention.heads, attention.head_dim)
        elif site.reads == "mlp":
            sites[name] = online_hadamard(*_C.factor_sizes(site.k))
    return LayerRotations(layer, sites)


def _hadamard(order: int) -> Factor:
    return Factor(order, True, np.empty((0, 2), np.int32), np.empty(0))
