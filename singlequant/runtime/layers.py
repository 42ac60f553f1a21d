# SPDX-License-Identifier: Apache-2.0
"""Drives the C decoder: one call per layer, over dense weights (recording) or packed ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..models.spec import ModelSpec
from ..weights import PackedLinear


def architecture_row(spec: ModelSpec) -> dict[str, object]:
    """What the C decoder needs to know of a model, from its config."""
    a = spec.attention
    return {
        "hidden": spec.hidden,
        "intermediate": spec.layer(0).mlp.intermediate,
        "heads": a.heads,
        "kv_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "rms_eps": spec.final_norm.eps,
        "sliding_window": a.window,
        "inv_freq": np.array(a.rotary.inv_freq, np.float32),
        "rope_scale": a.rotary.scale,
    }


def build_layer(checkpoint, index: int) -> _C.DecoderLayer:
    """The C layer `index` of a Checkpoint; packed weights go into the CPU's panel order."""
    weights, spec = checkpoint.layer(index), checkpoint.spec.layer(index)
    linears = []
    site_of = {role: site.name for site in spec.sites.values() for role in site.roles}
    for role, linear in weights.linears.items():
        weight = linear.weight
        if isinstance(weight, PackedLinear):
            high = weights.int8_inputs.get(site_of[role], 0)
            weight = _C.PackedWeight(weight.words, weight.scales, weight.shape[1], weight.group,
                                     high)
        linears.append((weight, linear.bias))
    sites: list[tuple | None] = [None] * len(spec.sites)
    if checkpoint.quant_config is not None:
        bits = checkpoint.quant_config.activation_bits
        for i, site in enumerate(spec.sites):
            rotation = weights.rotations.get(site, (None, None))
            if len(rotation) == 3:  # a BlockRotation's stand in place of left
                rotation = (rotation, None)
            sites[i] = (*rotation, bits, weights.clips[site])
    norms = [norm.weight for norm in weights.norms.values()]
    return _C.DecoderLayer(architecture_row(checkpoint.spec), norms, linears, sites)


def new_cache(
    spec: ModelSpec,
    layers: int,
    sequences: int,
    capacity: int,
    bits: int = 32,
    hadamard: bool = True,
    limit: int = 0,
) -> _C.KVCache:
    """An empty KV cache for so many of the model's layers; see _C.KVCache."""
    a = spec.attention
    return _C.KVCache(layers, sequences, a.kv_heads, a.head_dim, capacity, bits, hadamard, limit)


def flat_positions(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Sequence index and position of each token of concatenated sequences of these lengths."""
    lengths = np.asarray(lengths, np.int64)
    sequence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return sequence, np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(starts, lengths)
