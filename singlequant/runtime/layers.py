# SPDX-License-Identifier: Apache-2.0
"""Drives the C decoder over dense weights (recording) or packed ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..models.spec import LayerSpec, ModelSpec, roles_of
from ..weights import Norm, PackedLinear


def layer_blocks(
    spec: LayerSpec,
    norms: Mapping[str, Norm],
    linears: Mapping[str, tuple[str, Any, Any]],
    sites: Mapping[str, tuple[int, Any, int, float]],
) -> dict[str, Any]:
    """Arguments of `_C.DecoderLayer`.

    norms: by place. linears: (site, weight, bias or None) by role. sites: (k, rotation or None,
    bits, clip) by name.
    """
    a = spec.attention
    rotary = a.rotary and (np.array(a.rotary.inv_freq, np.float32), a.rotary.scale)

    def of(block: str) -> dict[str, Any]:
        return {role: linears[role] for role in roles_of(block) if role in linears}

    return {
        "hidden": spec.hidden,
        "sites": dict(sites),
        "attention": {
            "heads": a.heads, "kv_heads": a.kv_heads, "head_dim": a.head_dim, "window": a.window,
            "scale": a.scale, "rotary": rotary, **of("attention"),
        },
        "mlp": {"activation": spec.mlp.activation, **of("mlp")},
        "norms": {
            place: (norm.kind, norm.eps, norm.offset, norms[place].weight, norms[place].bias)
            for place, norm in spec.norms.items()
        },
        "parallel": spec.parallel,
        "residual_scale": spec.residual_scale,
    }  # fmt: skip


def build_layer(checkpoint, index: int) -> _C.DecoderLayer:
    """The C layer `index` of a Checkpoint; packed weights go into the CPU's panel order."""
    spec, weights = checkpoint.spec.layer(index), checkpoint.layer(index)
    config = checkpoint.quant_config
    bits = 16 if config is None else config.activation_bits
    linears, sites = {}, {}
    for name, site in spec.sites.items():
        for role in site.roles:
            linear = weights.linears[role]
            weight = linear.weight
            if isinstance(weight, PackedLinear):
                weight = _C.PackedWeight(weight.words, weight.scales, site.k, weight.group,
                                         weights.int8_inputs.get(name, 0))
            linears[role] = name, weight, linear.bias
        sites[name] = site.k, weights.rotations.get(name), bits, weights.clips.get(name, 1.0)
    return _C.DecoderLayer(**layer_blocks(spec, weights.norms, linears, sites))


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


def flat_positions(
    lengths: NDArray[np.int64], starts: NDArray[np.int64] | int = 0
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Sequence index and position of each token of concatenated sequences of these lengths.

    starts: the position of each sequence's first token.
    """
    lengths = np.asarray(lengths, np.int64)
    ends = lengths.cumsum()
    sequence = np.arange(len(lengths), dtype=np.int32).repeat(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return sequence, np.arange(total) + (starts + lengths - ends).repeat(lengths)
