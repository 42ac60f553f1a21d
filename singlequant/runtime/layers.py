# SPDX-License-Identifier: Apache-2.0
"""Drives the C decoder over dense weights (recording) or packed ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..models.spec import (
    INNER_NORMS,
    NORM_PLACES,
    AttentionSpec,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    roles_of,
)
from ..weights import Dense, Norm, PackedLinear


def layer_blocks(
    spec: LayerSpec,
    norms: Mapping[str, Norm],
    linears: Mapping[str, tuple[str, Any, Any]],
    sites: Mapping[str, tuple[int, Any, int, float]],
    dense: Mapping[str, Dense] | None = None,
) -> dict[str, Any]:
    """Arguments of `_C.DecoderLayer`.

    norms: by place. linears: (site, weight, bias or None) by role. sites: (k, rotation or None,
    bits, clip) by name. dense: by what it is, as LayerSpec.dense.
    """
    rules = {
        place: (norm.kind, norm.eps, norm.offset, norms[place].weight, norms[place].bias)
        for place, norm in spec.norms.items()
    }
    arrays = {key: tensor.array for key, tensor in (dense or {}).items()}
    blocks = {
        "hidden": spec.hidden,
        "sites": dict(sites),
        "attention": _attention(spec.attention, rules, linears, arrays),
        "mlp": None if spec.mlp is None else _mlp(spec.mlp, linears),
        "norms": {place: rule for place, rule in rules.items() if place in NORM_PLACES},
        "parallel": spec.parallel,
        "residual_scale": spec.residual_scale,
    }
    if spec.norm_sums:
        blocks["norm_sums"] = True
    if spec.experts is not None:
        blocks["experts"] = _experts(spec.experts, linears, arrays)
    return blocks


def _of(block: str, linears: Mapping[str, Any], end: str = "") -> dict[str, Any]:
    """The linears of a block by role."""
    return {role: linears[role + end] for role in roles_of(block) if role + end in linears}


def _attention(
    a: AttentionSpec, rules: Mapping[str, Any], linears: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
) -> dict[str, Any]:
    rotary = a.rotary
    if rotary is not None:
        long = rotary.long_inv_freq
        rotary = dataclasses.asdict(rotary) | {
            "inv_freq": np.array(rotary.inv_freq, np.float32),
            "long_inv_freq": np.array(long, np.float32) if long else None,
        }
    values = {
        "heads": a.heads, "kv_heads": a.kv_heads, "head_dim": a.head_dim, "window": a.window,
        "scale": a.scale, "rotary": rotary,
        **{key: getattr(a, key) for key in ("softcap", "qkv_clip", "slopes_bfloat16",
                                           "query_growth", "query_original")
           if getattr(a, key)},
        **{place: rule for place, rule in rules.items() if place in INNER_NORMS},
        **_of("attention", linears),
    }  # fmt: skip
    if a.slopes:
        values["slopes"] = np.array(a.slopes, np.float32)
    if "sinks" in arrays:
        values["sinks"] = _C.to_float32(arrays["sinks"])
    if a.kv_rank:
        values["value_dim"] = a.value_channels
    return values


def _mlp(mlp: MlpSpec, linears: Mapping[str, Any]) -> dict[str, Any]:
    values = {"activation": mlp.activation, "gate": None, **_of("mlp", linears)}
    return values | ({"limit": mlp.limit} if mlp.limit else {})


def _experts(
    e: ExpertsSpec, linears: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> dict[str, Any]:
    shared = {role.removeprefix("shared_"): linear
              for role, linear in _of("shared", linears).items()}
    each = [_of("mlp", linears, f".{i}") for i in range(e.count)]
    vectors = {key: _C.to_float32(arrays[key]) for key in ("router_bias", "correction")
               if key in arrays}
    return {
        "count": e.count, "chosen": e.chosen, "scoring": e.scoring, "normalize": e.normalize,
        "scale": e.scale, "groups": e.groups, "chosen_groups": e.chosen_groups,
        "group_score": e.group_score, "router": arrays["router"], **vectors,
        "activation": e.activation, "limit": e.limit,
        "each": [(m.get("gate"), m["up"], m["down"]) for m in each],
        "shared": {"activation": e.activation, **shared} if shared else None,
        "shared_gate": arrays.get("shared_router"),
    }  # fmt: skip


def build_layer(checkpoint, index: int) -> _C.DecoderLayer:
    """The C layer `index` of a Checkpoint; packed weights go into the CPU's panel order.

    FormatError where the core finds that config.json's numbers make no layer.
    """
    weights, config = checkpoint.layer(index), checkpoint.quant_config
    linears = {}
    for name, site in checkpoint.spec.layer(index).sites.items():
        for role in site.roles:
            linear = weights.linears[role]
            weight = linear.weight
            if isinstance(weight, PackedLinear):
                weight = _C.PackedWeight(weight.words, weight.scales, site.k, weight.group,
                                         weights.int8_inputs.get(name, 0), weight.bits)
                checkpoint.release_packed(linear.name)  # its memory is the panels alone
            linears[role] = name, weight, linear.bias
    bits = 16 if config is None else config.activation_bits
    return assemble(checkpoint, index, linears, weights.rotations, bits)


def assemble(
    checkpoint, index: int, linears: Mapping[str, tuple[str, Any, Any]],
    rotations: Mapping[str, Any], bits: int,
) -> _C.DecoderLayer:
    """The C layer `index` of linears that are given, as (site, weight, bias) by role.

    rotations: by site, of what packed linears read, which has `bits` bits.
    """
    spec, weights = checkpoint.spec.layer(index), checkpoint.layer(index)
    sites = {name: (site.k, rotations.get(name), bits, weights.clips.get(name, 1.0))
             for name, site in spec.sites.items()}
    blocks = layer_blocks(spec, weights.norms, linears, sites, weights.dense)
    try:
        return _C.DecoderLayer(**blocks)
    except ValueError as error:
        problem = str(error).replace(", got ", ", found ")
        raise _C.FormatError(f"{checkpoint.path}: layer {index}: {problem}") from None


def new_cache(
    spec: ModelSpec,
    layers: int,
    sequences: int,
    capacity: int,
    bits: int = 32,
    hadamard: bool = True,
    limit: int = 0,
    bfloat16: bool = False,
) -> _C.KVCache:
    """An empty KV cache for so many of the model's layers; see _C.KVCache."""
    a = spec.attention
    return _C.KVCache(layers, sequences, a.kv_heads, a.head_dim, capacity, bits, hadamard, limit,
                      bfloat16)


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
