"""Drives the C decoder: one call per layer, over dense weights (recording) or packed ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..config import SITES
from ..models.family import ModelShape, rope_frequencies
from ..weights import PackedLinear


def architecture_row(shape: ModelShape) -> dict[str, object]:
    """What the C decoder needs to know of a model, from its config."""
    inv_freq, rope_scale = rope_frequencies(shape)
    return {
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_eps": shape.rms_eps,
        "sliding_window": shape.sliding_window or 0,
        "inv_freq": inv_freq,
        "rope_scale": rope_scale,
    }


def build_layer(checkpoint, index: int) -> _C.DecoderLayer:
    """The C layer `index` of a Checkpoint; packed weights go into the CPU's panel order."""
    weights = checkpoint.layer(index)
    linears = []
    site_of = {r: s for s, roles in checkpoint.architecture.sites.items() for r in roles}
    for role, linear in weights.linears.items():
        weight = linear.weight
        if isinstance(weight, PackedLinear):
            high = weights.high.get(site_of[role], 0)
            weight = _C.PackedWeight(weight.words, weight.scales, weight.shape[1], weight.group,
                                     high)
        linears.append((weight, linear.bias))
    sites: list[tuple | None] = [None] * len(SITES)
    if checkpoint.quant_config is not None:
        bits = checkpoint.quant_config.activation_bits
        for i, site in enumerate(SITES):
            sites[i] = (weights.rotations.get(site), bits, weights.clips[site])
    return _C.DecoderLayer(architecture_row(checkpoint.shape), weights.norms, linears, sites)


def flat_positions(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Sequence index and position of each token of concatenated sequences of these lengths."""
    lengths = np.asarray(lengths, np.int64)
    sequence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return sequence, np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)
