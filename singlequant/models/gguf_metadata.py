# SPDX-License-Identifier: Apache-2.0
"""GGUF's metadata of a model, such that a reader finds the same model: `make_config` backwards.

What `make_config` would make of them is compared with the model. What GGUF cannot say is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .families import find_family
from .gguf_config import (
    KEYS,
    ROPE_FACTORS,
    ROPE_LONG,
    ROPE_SHORT,
    ROWS,
    SCALING,
    TOKENS,
    Config,
    Row,
    make_config,
)
from .rope import FULL, ORIGINAL, SLIDING
from .spec import LayerSpec, ModelSpec, RotarySpec

OTHERS = {"MistralForCausalLM": "llama", "MixtralForCausalLM": "llama"}  # beside the rows' own
SLIDES = ("gemma2", "gemma3")  # the rows in which llama.cpp attends to windows
UNTIED = ("qwen2moe",)  # whose head it does not take from the embedding
NORMS_FROM = 64  # layers from which its command-r has norms of queries and keys
NEAR = 1e-5  # relative: between frequencies and what is left of them in float32 factors
NOT_IN_YARN = ("attention_factor", "mscale", "mscale_all_dim", "truncate")


@dataclass(frozen=True)
class Metadata:
    """What a GGUF file says of a model. The keys are whole; tensors are factors of frequencies."""

    name: str  # of the architecture
    row: Row
    keys: Mapping[str, Any]
    tensors: Mapping[str, NDArray[np.float32]]


def gguf_metadata(config: Config, spec: ModelSpec, source: str) -> Metadata:
    """The metadata of a model. ValueError names what GGUF, or llama.cpp, has no words for.

    config: config.json as transformers has it, with `spec` its model. source: where it is from.
    """
    name, row = _architecture(spec, source)
    _require_llama_cpp(name, spec, source)
    own = _sizes(config, spec, row)
    tensors, scaling = _rotary(config, spec, source)
    own |= scaling
    keys = {f"{name}.{key}": value for key, value in own.items()}
    keys |= {there: config[key] for there, key in TOKENS.items() if type(config.get(key)) is int}
    found = Metadata(name, row, keys, tensors)
    difference = _difference(found, spec, source)
    if difference:
        what, theirs, own = difference
        raise ValueError(f"{source}: expected a {spec.family} as GGUF's keys of {name} describe "
                         f"it, with {what} = {theirs!r:.80}, found {own!r:.80}")
    return found


def _architecture(spec: ModelSpec, source: str) -> tuple[str, Row]:
    """GGUF's name of the family, and its row."""
    names = {row.architecture: name for name, row in ROWS.items()} | OTHERS
    if spec.family not in names:
        raise ValueError(f"{source}: expected a family that GGUF files are written of: "
                         f"{', '.join(names)}; found {spec.family}")
    return names[spec.family], ROWS[names[spec.family]]


def _require_llama_cpp(name: str, spec: ModelSpec, source: str) -> None:
    """ValueError for what the keys can say and llama.cpp does not do."""
    windows = [kind.attention.window for kind in spec.kinds if kind.attention.window]
    if name not in SLIDES and windows and min(windows) < spec.max_position_embeddings:
        raise ValueError(f"{source}: sliding_window: expected none, as llama.cpp's {name} attends "
                         f"to all tokens, found {min(windows)} of {spec.max_position_embeddings}")
    if name in UNTIED and spec.tied:
        raise ValueError(f"{source}: tie_word_embeddings: expected false, as llama.cpp's {name} "
                         "has a head of its own, found true")
    if name == "command-r" and "q_norm" in spec.layer(0).norms and spec.layers < NORMS_FROM:
        raise ValueError(f"{source}: use_qk_norm: expected false, as llama.cpp's {name} has such "
                         f"norms from {NORMS_FROM} layers on, found {spec.layers} layers")


def _sizes(config: Config, spec: ModelSpec, row: Row) -> dict[str, Any]:
    """Sizes and other numbers, by keys without the architecture in front."""
    found = {there: config[key] for there, key in (KEYS | row.keys).items()
             if type(config.get(key)) in (int, float)}
    attention, norm = spec.attention, spec.final_norm
    found |= {"block_count": spec.layers, "embedding_length": spec.hidden,
              "context_length": spec.max_position_embeddings, "vocab_size": spec.vocab,
              "attention.head_count": attention.heads,
              "attention.head_count_kv": attention.kv_heads,
              "attention.key_length": attention.head_dim,
              "attention.value_length": attention.value_channels}
    if attention.rotary:
        found["rope.dimension_count"] = 2 * len(attention.rotary.inv_freq)
    mlps = [kind.mlp for kind in spec.kinds if kind.mlp]
    if mlps:
        found["feed_forward_length"] = mlps[0].intermediate
    if norm:
        key = "layer_norm_rms_epsilon" if norm.kind == "rms" else "layer_norm_epsilon"
        found[f"attention.{key}"] = norm.eps
    if not any(kind.attention.window for kind in spec.kinds):
        found.pop("attention.sliding_window", None)
    return found


# ---- rotary embedding ---------------------------------------------------------------------------


def _rotary(
    config: Config, spec: ModelSpec, source: str
) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """Tensors of factors, and keys of the rotary embedding of layers with full attention."""
    values, sliding = (_parameters(config, kind) for kind in (FULL, SLIDING))
    theta = values.get("rope_theta", config.get("rope_theta", 10000.0))
    rotary = next((kind.attention.rotary for kind in spec.kinds
                   if kind.attention.rotary and not kind.attention.window),
                  spec.attention.rotary)
    keys: dict[str, Any] = {"rope.freq_base": float(theta)}
    if sliding != values and "rope_theta" in sliding:
        keys["rope.freq_base_swa"] = float(sliding["rope_theta"])
    kind = values.get("rope_type", values.get("type", "default"))
    if rotary is None or kind == "default":
        return {}, keys
    if kind == "linear":
        return {}, keys | {f"{SCALING}type": "linear", f"{SCALING}factor": float(values["factor"])}
    if kind == "yarn":
        given = [key for key in NOT_IN_YARN if values.get(key) is not None]
        if given:
            raise ValueError(f"{source}: {given[0]}: expected none, as GGUF's yarn has no such "
                             f"key, found {values[given[0]]!r:.80}")
        original = values.get(ORIGINAL) or config.get(ORIGINAL) or spec.max_position_embeddings
        keys |= {f"{SCALING}type": "yarn", f"{SCALING}factor": float(values["factor"]),
                 f"{SCALING}original_context_length": int(original)}
        return {}, keys | {f"{SCALING}yarn_{key}": float(values[key])
                           for key in ("beta_fast", "beta_slow") if values.get(key)}
    if rotary.dynamic:
        raise ValueError(f"{source}: rope_type: expected one that GGUF has: linear, yarn, llama3 "
                         f"or longrope; found {kind!r:.80}")
    return _factors(rotary, theta, keys)


def _factors(
    rotary: RotarySpec, theta: float, keys: dict[str, Any]
) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """A factor for every frequency: the plain frequency divided by the model's."""
    count = len(rotary.inv_freq)
    plain = 1.0 / np.power(np.float64(theta), np.arange(count) / count)
    short, long = ((plain / np.array(each)).astype(np.float32)
                   for each in (rotary.inv_freq, rotary.long_inv_freq or rotary.inv_freq))
    if rotary.scale == 1.0 and np.array_equal(short, long):
        return {ROPE_FACTORS: short}, keys
    keys |= {f"{SCALING}type": "longrope", f"{SCALING}attn_factor": rotary.scale}
    if rotary.original:
        keys[f"{SCALING}original_context_length"] = rotary.original
    return {ROPE_LONG: long, ROPE_SHORT: short}, keys


def _parameters(config: Config, kind: str) -> dict[str, Any]:
    """rope_parameters and rope_scaling, of that kind of layer where each has its own."""
    found: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        values = config.get(key) or {}
        found |= values.get(kind) or {} if kind in values else values
    return found


# ---- reading it back ----------------------------------------------------------------------------


def _difference(found: Metadata, spec: ModelSpec, source: str) -> tuple[str, Any, Any] | None:
    """(what, as a reader would find it, as it is) of the first part that differs, or None."""
    meta = {"general.architecture": found.name, **found.keys}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (spec.vocab, spec.width)}
    shapes |= {name: array.shape for name, array in found.tensors.items()}
    first = spec.layer(0)
    shapes |= {f"blk.0.{name}.bias": () for name, role in (("attn_q", "q"), ("ffn_up", "up"))
               if role in first.linears and first.linears[role].bias}
    shapes |= {"blk.0.attn_q_norm.weight": ()} if "q_norm" in first.norms else {}
    if not spec.tied:
        shapes["output.weight"] = shapes["token_embd.weight"]
    config = make_config(Path(source), found.name, found.row, _as_stored(meta), shapes,
                         lambda name: found.tensors[name])
    read = find_family(config, source).spec(config, source)
    pairs = [("", _outer(read), _outer(spec))]
    pairs += [(f"layer {i}: ", *(_compared(model.layer(i)) for model in (read, spec)))
              for i in range(spec.layers)]
    for where, theirs, own in pairs:
        different = next((key for key, value in theirs.items() if value != own[key]), None)
        if different:
            return f"{where}{different}", theirs[different], own[different]
    for i in range(spec.layers):
        both = [model.layer(i).attention.rotary for model in (read, spec)]
        if not _same_rotary(*both):
            return f"layer {i}: rotary embedding", *both
    return None


def _as_stored(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as a file holds them: floats of 32 bits."""
    return {key: float(np.float32(value)) if isinstance(value, float) else value
            for key, value in meta.items()}


def _outer(model: ModelSpec) -> dict[str, Any]:
    """What is compared of a model outside its layers, by name."""
    found = {field.name: getattr(model, field.name) for field in fields(model)}
    for name in ("kinds", "pattern", "max_position_embeddings"):
        del found[name]
    return {name: _rounded(value) for name, value in found.items()}


def _compared(layer: LayerSpec) -> dict[str, Any]:
    """What is compared of a layer by name: no rotary embedding, no places of linears."""
    found = {f"attention.{field.name}": getattr(layer.attention, field.name)
             for field in fields(layer.attention) if field.name != "rotary"}
    linears = {role: (x.n, x.k, x.bias) for role, x in layer.linears.items()}
    found |= {field.name: getattr(layer, field.name) for field in fields(layer)
              if field.name not in ("attention", "dense")} | {"linears": linears}
    return {name: _rounded(value) for name, value in found.items()}


def _rounded(value: Any) -> Any:
    """A value with its numbers as a file holds them in float32."""
    if is_dataclass(value):
        return {field.name: _rounded(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _same_rotary(read: RotarySpec | None, own: RotarySpec | None) -> bool:
    """Whether two rotary embeddings turn alike, within what float32 factors lose."""
    if read is None or own is None:
        return read is own
    long = [each.long_inv_freq or each.inv_freq for each in (read, own)]
    if len(read.inv_freq) != len(own.inv_freq):
        return False
    near = all(np.allclose(*pair, rtol=NEAR, atol=0)
               for pair in ((read.inv_freq, own.inv_freq), long))
    scale = math.isclose(read.scale, own.scale, rel_tol=NEAR)
    same_length = np.allclose(*long, rtol=NEAR, atol=0) and long[1] == own.inv_freq
    return near and scale and read.dynamic == own.dynamic and (
        same_length or read.original == own.original) and read.interleaved == own.interleaved
