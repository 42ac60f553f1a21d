# SPDX-License-Identifier: Apache-2.0
"""Model families as data: tensor names, who feeds whom, and config.json as a validated shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._C import FormatError

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ModelShape",
    "Rope",
    "find_architecture",
    "iterate_tensors",
    "parse_shape",
    "rope_frequencies",
]

# What the linears of a site read. For the lead: `Site.reads`.
READS = {"qkv": "residual", "o": "attention", "gate_up": "residual", "down": "mlp"}

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Architecture:
    """One row: where a family keeps its tensors. `{i}` in a template is the layer's index."""

    name: str  # config.json's architectures[0]
    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    norms: tuple[str, str] = (
        "model.layers.{i}.input_layernorm",
        "model.layers.{i}.post_attention_layernorm",
    )
    linears: Mapping[str, str] = field(
        default_factory=lambda: {
            "q": "model.layers.{i}.self_attn.q_proj",
            "k": "model.layers.{i}.self_attn.k_proj",
            "v": "model.layers.{i}.self_attn.v_proj",
            "o": "model.layers.{i}.self_attn.o_proj",
            "gate": "model.layers.{i}.mlp.gate_proj",
            "up": "model.layers.{i}.mlp.up_proj",
            "down": "model.layers.{i}.mlp.down_proj",
        }
    )
    # A site is the set of linears that share an input.
    sites: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "qkv": ("q", "k", "v"),
            "o": ("o",),
            "gate_up": ("gate", "up"),
            "down": ("down",),
        }
    )
    # What produces a site's input, where a factor per channel folds for nothing: the weight of a
    # norm (by its place in `norms`), or the rows and bias of a linear.
    producers: Mapping[str, int | str] = field(
        default_factory=lambda: {"qkv": 0, "o": "v", "gate_up": 1, "down": "up"}
    )
    biases: bool = True  # whether attention_bias and mlp_bias of config.json mean anything
    window: bool = False  # whether sliding_window does
    ignored_tensors: tuple[str, ...] = ("*.rotary_emb.inv_freq",)  # buffers of old checkpoints
    # What transformers' config class assumes where config.json is silent.
    defaults: Mapping[str, Any] = field(default_factory=dict)


_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "rope_theta": 10000.0,
}

ARCHITECTURES = {
    row.name: row
    for row in (
        Architecture("LlamaForCausalLM", defaults=_LLAMA_DEFAULTS),
        Architecture(
            "MistralForCausalLM",
            biases=False,
            window=True,
            defaults={
                **_LLAMA_DEFAULTS,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
            },
        ),
    )
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: default, linear (factor) or llama3 (all fields)."""

    kind: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelShape:
    """config.json as numbers that were checked. Sizes in elements."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rms_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    sliding_window: int  # tokens a query sees, itself included; 0 = all
    attention_bias: bool
    mlp_bias: bool
    rope: Rope

    def linear(self, role: str) -> tuple[int, int]:
        """(n outputs, k inputs) of q, k, v, o, gate, up or down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (queries, self.hidden),
            "k": (keys, self.hidden),
            "v": (keys, self.hidden),
            "o": (self.hidden, queries),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }[role]

    def site(self, site: str) -> int:
        """k inputs of qkv, o, gate_up or down."""
        first = {"qkv": "q", "o": "o", "gate_up": "gate", "down": "down"}[site]
        return self.linear(first)[1]

    def bias(self, role: str) -> bool:
        """Whether the linear of that role has a bias."""
        return self.attention_bias if role in ("q", "k", "v", "o") else self.mlp_bias

    @property
    def parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        per_layer = sum(
            n * k + (n if self.bias(role) else 0)
            for role, (n, k) in ((role, self.linear(role)) for role in LINEARS)
        )
        embeddings = self.vocab * self.hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.hidden + self.layers * (per_layer + 2 * self.hidden)


# ---- config.json --------------------------------------------------------------------------------


def find_architecture(config: Mapping[str, Any], source: str = "config.json") -> Architecture:
    """The row that config.json's `architectures` names. FormatError lists the supported ones."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    row = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if row is None:
        raise FormatError(
            f"{source}: architectures: expected one of {', '.join(ARCHITECTURES)}, found {name!r}"
        )
    return row


def parse_shape(
    config: Mapping[str, Any], architecture: Architecture, source: str = "config.json"
) -> ModelShape:
    """Checks config.json. FormatError names the key, what was expected and what was found."""
    c = _Config({**architecture.defaults, **config}, source)
    hidden, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    kv_heads = heads if c.absent("num_key_value_heads") else c.integer("num_key_value_heads")
    if heads % kv_heads:
        raise c.error("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    if not c.absent("head_dim"):
        head_dim = c.integer("head_dim")
    elif hidden % heads:
        raise c.error("num_attention_heads", f"a divisor of hidden_size = {hidden} (no head_dim)")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise FormatError(f"{source}: head_dim: expected an even number, found {head_dim}")
    if c["hidden_act"] not in ("silu", "swish"):
        raise c.error("hidden_act", "'silu'")
    kinds = [] if c.absent("layer_types") else c["layer_types"]
    if not isinstance(kinds, list) or any(kind != kinds[0] for kind in kinds):
        raise c.error("layer_types", "a list with one kind of attention for all layers")
    window = architecture.window and not c.absent("sliding_window")
    return ModelShape(
        hidden=hidden,
        intermediate=c.integer("intermediate_size"),
        layers=c.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=c.integer("vocab_size"),
        rms_eps=c.number("rms_norm_eps", c["rms_norm_eps"]),
        tie_word_embeddings=c.boolean("tie_word_embeddings"),
        max_position_embeddings=c.integer("max_position_embeddings"),
        sliding_window=c.integer("sliding_window") if window else 0,
        attention_bias=architecture.biases and c.boolean("attention_bias"),
        mlp_bias=architecture.biases and c.boolean("mlp_bias"),
        rope=_parse_rope(c),
    )


class _Config:
    """config.json with typed access; every error names the file, the key and both facts."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values, self._source = values, source

    def __getitem__(self, key: str) -> Any:
        return self._values.get(key)

    def absent(self, key: str) -> bool:
        return self._values.get(key) is None

    def error(self, key: str, expected: str, found: Any = None) -> FormatError:
        found = self._values.get(key) if found is None else found
        return FormatError(f"{self._source}: {key}: expected {expected}, found {found!r}")

    def integer(self, key: str, value: Any = None) -> int:
        value = self[key] if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise self.error(key, "an integer from 1 to 2147483647", value)
        return value

    def number(self, key: str, value: Any) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 1e-30 <= value <= 1e30:  # also false for nan
            raise self.error(key, "a number from 1e-30 to 1e30", value)
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self[key]
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value


def _parse_rope(c: _Config) -> Rope:
    """rope_scaling (4.x) or rope_parameters (5.x); rope_scaling wins, as there."""
    key = "rope_scaling" if c["rope_scaling"] else "rope_parameters"
    given = c[key] or {}
    if not isinstance(given, dict):
        raise c.error(key, "an object")
    partial = given.get("partial_rotary_factor", c["partial_rotary_factor"])
    if partial is not None and partial != 1:
        raise c.error("partial_rotary_factor", "1 (partial rotary is not supported)", partial)
    theta = c.number("rope_theta", given.get("rope_theta", c["rope_theta"]))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return Rope("default", theta)
    if kind not in ("linear", "llama3"):
        raise c.error(f"{key}.rope_type", "one of default, linear, llama3", kind)
    factor = c.number(f"{key}.factor", given.get("factor"))
    if kind == "linear":
        return Rope("linear", theta, factor)
    low = c.number(f"{key}.low_freq_factor", given.get("low_freq_factor"))
    high = c.number(f"{key}.high_freq_factor", given.get("high_freq_factor"))
    if high <= low:
        raise c.error(f"{key}.high_freq_factor", f"more than low_freq_factor = {low}", high)
    name = "original_max_position_embeddings"
    original = c[name] or given.get(name) or c["max_position_embeddings"]
    return Rope("llama3", theta, factor, low, high, c.integer(f"{key}.{name}", original))


# ---- what follows from the shape ----------------------------------------------------------------


def iterate_tensors(
    shape: ModelShape, architecture: Architecture = ARCHITECTURES["LlamaForCausalLM"]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor, outer ones first, then layer by layer."""
    yield f"{architecture.embed}.weight", (shape.vocab, shape.hidden)
    yield f"{architecture.final_norm}.weight", (shape.hidden,)
    if not shape.tie_word_embeddings:
        yield f"{architecture.head}.weight", (shape.vocab, shape.hidden)
    for i in range(shape.layers):
        for norm in architecture.norms:
            yield f"{norm.format(i=i)}.weight", (shape.hidden,)
        for role, template in architecture.linears.items():
            yield f"{template.format(i=i)}.weight", shape.linear(role)
            if shape.bias(role):
                yield f"{template.format(i=i)}.bias", shape.linear(role)[:1]


def rope_frequencies(shape: ModelShape) -> tuple[NDArray[np.float32], float]:
    """(inverse frequencies [head_dim / 2], factor of cos and sin), in transformers' float32 steps.

    llama3 (Llama 3.1): wavelengths beyond original / low_freq_factor are divided by factor, those
    below original / high_freq_factor are kept, and those between are interpolated.
    """
    rope, f32 = shape.rope, np.float32
    exponents = np.arange(0, shape.head_dim, 2).astype(f32) / f32(shape.head_dim)
    # The power is rounded once from float64: libraries differ in float32's last bit, torch least.
    inv_freq = f32(1) / (rope.theta ** exponents.astype(np.float64)).astype(f32)
    if rope.kind == "linear":
        inv_freq = inv_freq / f32(rope.factor)
    elif rope.kind == "llama3":
        original = rope.original_max_position_embeddings
        # torch computes number / tensor as the tensor's reciprocal times the number.
        wavelength = f32(1) / inv_freq * f32(2 * math.pi)
        slow = wavelength > f32(original / rope.low_freq_factor)
        fast = wavelength < f32(original / rope.high_freq_factor)
        scaled = np.where(slow, inv_freq / f32(rope.factor), inv_freq)
        smooth = (f32(1) / wavelength * f32(original) - f32(rope.low_freq_factor)) / f32(
            rope.high_freq_factor - rope.low_freq_factor
        )
        between = (f32(1) - smooth) * scaled / f32(rope.factor) + smooth * scaled
        inv_freq = np.where(~slow & ~fast, between, scaled)
    return np.ascontiguousarray(inv_freq, f32), 1.0
