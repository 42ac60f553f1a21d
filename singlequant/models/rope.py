# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding: what config.json says of it, and the frequencies that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .config_json import Fields
from .spec import RotarySpec


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: default, linear (factor) or llama3 (all fields)."""

    kind: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


def parse_rope(c: Fields) -> Rope:
    """rope_scaling (transformers 4) or rope_parameters (5); rope_scaling wins, as there.

    FormatError for another type and for a number that is missing or out of range.
    """
    scaling, parameters = c["rope_scaling"], c["rope_parameters"]
    key, given = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters or {})
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
    return Rope("llama3", theta, factor, low, high, c.integer(f"{key}.{name}", 1, original))


def rotary_spec(rope: Rope, head_dim: int) -> RotarySpec:
    """The frequencies of a head, in transformers' float32 steps."""
    with np.errstate(over="ignore", divide="ignore"):  # the family refuses what is not finite
        return RotarySpec(tuple(rope_frequencies(rope, head_dim).tolist()))


def rope_frequencies(rope: Rope, head_dim: int) -> NDArray[np.float32]:
    """Inverse frequencies [head_dim / 2] in rad per position.

    llama3 (Llama 3.1): wavelengths beyond original / low_freq_factor are divided by factor, those
    below original / high_freq_factor are kept, and those between are interpolated.
    """
    f32 = np.float32
    exponents = np.arange(0, head_dim, 2).astype(f32) / f32(head_dim)
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
    return np.ascontiguousarray(inv_freq, f32)
