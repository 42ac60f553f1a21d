"""Drives the C decoder over dense weights (recording) or packed ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..models.family import ModelShape, rope_frequencies
from ..weights import PackedLinear


def layer_blocks(
    shape: ModelShape,
    norms: Sequence[Any],
    linears: Mapping[str, tuple[str, Any, Any]],
    sites: Mapping[str, tuple[int, Any, int, float]],
) -> dict[str, Any]:
    """Arguments of `_C.DecoderLayer` for a layer as LLaMA has them.

    norms: weights [hidden] before attention and before the MLP. linears: (site, weight, bias or
    None) by role. sites: (k, rotation or None, bits, clip) by name.
    """
    return {
        "hidden": shape.hidden,
        "sites": dict(sites),
        "attention": {
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "window": shape.sliding_window or 0,
            "scale": 1 / math.sqrt(shape.head_dim),
            "rotary": rope_frequencies(shape),
            **{role: linears[role] for role in ("q", "k", "v", "o")},
        },
        "mlp": {"activation": "silu", **{role: linears[role] for role in ("gate", "up", "down")}},
        "norms": {
            name: ("rms", shape.rms_eps, 0.0, weight, None)
            for name, weight in zip(("before_attention", "before_mlp"), norms, strict=True)
        },
    }


def build_layer(checkpoint, index: int) -> _C.DecoderLayer:
    """The C layer `index` of a Checkpoint; packed weights go into the CPU's panel order."""
    weights, config = checkpoint.layer(index), checkpoint.quant_config
    linears, sites = {}, {}
    for site, roles in checkpoint.architecture.sites.items():
        for role in roles:
            linear = weights.linears[role]
            weight, k = linear.weight, linear.weight.shape[1]
            if isinstance(weight, PackedLinear):
                weight = _C.PackedWeight(weight.words, weight.scales, k, weight.group,
                                         weights.high.get(site, 0))
            linears[role] = (site, weight, linear.bias)
        bits = 16 if config is None else config.activation_bits
        sites[site] = (k, weights.rotations.get(site), bits, weights.clips.get(site, 1.0))
    return _C.DecoderLayer(**layer_blocks(checkpoint.shape, weights.norms, linears, sites))


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
