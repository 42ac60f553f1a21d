# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding: what config.json says of it, and the frequencies that follow.

The frequencies take transformers' float32 steps. A power is rounded once from float64, as libraries
differ in float32's last bit and torch least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config_json import Fields
from .spec import RotarySpec

FULL, SLIDING = "full_attention", "sliding_attention"  # of layer_types; a plain scaling is FULL's
ORIGINAL = "original_max_position_embeddings"
# Keys of the parameters that transformers reads for some types and leaves unread for the others.
READ_BY_TYPE = (
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", ORIGINAL,
    "attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor",
    "high_freq_factor", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip
# Keys that it reads for no type.
UNREAD = ("llama_4_scaling_beta", "finetuned", "extrapolation_factor", "attn_factor")

f32 = np.float32


@dataclass(frozen=True)
class Rope:
    """The parameters of one rotary embedding and where they stand."""

    c: Fields  # config.json
    g: Fields  # the parameters in it
    theta: float
    dim: int  # channels that turn
    share: float  # of the head's channels

    def powers(self) -> NDArray[np.float32]:
        """theta^(2i / dim) for i < dim / 2."""
        exponents = np.arange(0, self.dim, 2).astype(f32) / f32(self.dim)
        return (self.theta ** exponents.astype(np.float64)).astype(f32)

    def optional(self, key: str, default: float) -> float:
        """A number of the parameters; the default where it is missing, null or 0."""
        return self.g.number(key) if self.g[key] else default

    def original(self) -> int:
        """The length that the model was trained for before its frequencies were scaled."""
        return self.g.integer(ORIGINAL, 2, self.g[ORIGINAL] or self.c["max_position_embeddings"])

    def factor_of_lengths(self) -> float:
        """`factor`, or how far max_position_embeddings goes beyond the original length."""
        if "factor" in self.g:
            return self.g.number("factor")
        return self.c.integer("max_position_embeddings") / self.original()


def rotary_spec(
    c: Fields,
    head_dim: int,
    *,
    kind: str | None = None,
    interleaved: bool = False,
    theta_key: str = "rope_theta",
    partial_key: str | None = "partial_rotary_factor",
    dim: int | None = None,
) -> RotarySpec:
    """The rotary embedding that config.json describes, for heads of head_dim channels.

    kind: "full_attention" or the like, in a family whose kinds of layers have parameters of their
    own. interleaved: the channels 2i and 2i + 1 turn together. theta_key and partial_key: the keys
    of config.json that hold where the parameters are silent. partial_key None: the family turns
    whole heads, and another share is refused. dim: the channels that turn, where the family gives
    their number outright.

    FormatError for a type that is not known and for a number that is missing or out of range.
    """
    g = _parameters(c, kind)
    c.ignore(theta_key, partial_key or theta_key)
    theta = g.number("rope_theta") if "rope_theta" in g else c.number(theta_key)
    name = _type(g)
    if not isinstance(name, str) or name not in TYPES:
        raise g.error("rope_type", f"one of {', '.join(TYPES)}", name)
    if name == "proportional":  # of a whole head in any family
        partial_key = partial_key or "partial_rotary_factor"
    share = 1.0 if dim else _share(c, g, partial_key)
    turning = head_dim if name == "proportional" else dim or int(head_dim * share)
    if turning % 2 or not 2 <= turning <= head_dim:
        raise c.error(partial_key or "head_dim", f"an even number of channels from 2 to {head_dim} "
                                                 "to turn", turning)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # refused below
        rotary = TYPES[name](Rope(c, g, theta, turning, share))
    if not all(map(math.isfinite, (*rotary.inv_freq, *rotary.long_inv_freq, rotary.scale))):
        raise c.error(theta_key, "frequencies that are finite in float32", theta)
    g.ignore(*READ_BY_TYPE)
    g.require_no_others(UNREAD)
    return replace(rotary, interleaved=interleaved)


def yarn_mscale(c: Fields) -> float:
    """The factor by which DeepSeek scales q and k each for a text beyond the original length.

    0.1 * mscale_all_dim * ln(factor) + 1, or 1 where mscale_all_dim is missing or 0. The scores
    hold it twice: the caller multiplies the attention scale by its square.
    """
    g = _parameters(c, None)
    if _type(g) == "default" or not g["mscale_all_dim"]:
        return 1.0
    return _mscale(g.number("factor"), g.number("mscale_all_dim"))


def _parameters(c: Fields, kind: str | None) -> Fields:
    """The parameters of a kind of layer, or of all layers where kind is None.

    rope_scaling (transformers 4) wins over rope_parameters (5), as there. Where the kinds have
    parameters of their own, a plain rope_scaling is about the layers of full attention.
    """
    scaling, parameters = (_object(c, key) for key in ("rope_scaling", "rope_parameters"))
    name, values = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters)
    if kind is None:
        if _nested(values):
            raise c.error(name, "parameters that hold for all layers")
        # Beside the parameters the length wins, as in transformers.
        return c.under(name, {**values, ORIGINAL: c[ORIGINAL]} if c[ORIGINAL] else values)
    outer = values if _nested(values) else parameters
    if outer and not _nested(outer):
        raise c.error("rope_parameters", f"an object of parameters under {kind!r}")
    own = outer.get(kind) or {}
    if not isinstance(own, dict):
        raise c.error(name, f"an object of parameters under {kind!r}")
    # transformers looks for `truncate` beside the kinds and not under them.
    own = {**own, "truncate": outer.get("truncate")}
    if kind == FULL and values is not outer:
        return c.under(name, {**own, **values})
    return c.under(f"{name if values is outer else 'rope_parameters'}.{kind}", own)


def _object(c: Fields, key: str) -> dict[str, Any]:
    if c[key] and not isinstance(c[key], dict):
        raise c.error(key, "an object")
    return c[key] or {}


def _nested(values: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in values.values())


def _type(g: Fields) -> Any:
    """The type of the parameters. Phi-3's code calls longrope "su" or "yarn" in its old files."""
    name = g["rope_type"] or g["type"] or "default"
    return "longrope" if name == "su" or (name == "yarn" and "short_factor" in g) else name


def _share(c: Fields, g: Fields, key: str | None) -> float:
    """The share of a head's channels that turns."""
    where, name = (g, "partial_rotary_factor") if "partial_rotary_factor" in g else (
        c, key or "partial_rotary_factor")
    share = where.number(name) if name in where else 1.0
    if share != 1 and key is None:
        raise c.error(name, "1 (partial rotary is not supported)", share)
    if share > 1:
        raise c.error(name, "a share of at most 1", share)
    return share


# ---- the types ----------------------------------------------------------------------------------


def _spec(inv_freq: NDArray[np.float32], scale: float = 1.0) -> RotarySpec:
    return RotarySpec(tuple(inv_freq.astype(f32).tolist()), scale)


def _default(r: Rope) -> RotarySpec:
    return _spec(f32(1) / r.powers())


def _linear(r: Rope) -> RotarySpec:
    """Positions divided by a factor."""
    return _spec(f32(1) / r.powers() / f32(r.g.number("factor")))


def _proportional(r: Rope) -> RotarySpec:
    """The first channels turn as they would in a whole head, and the frequencies of the rest are 0.

    The pairs are those of the whole head. Gemma 4 has them.
    """
    inv_freq = f32(1) / r.powers()
    inv_freq[int(r.share * r.dim // 2):] = 0
    return _spec(inv_freq / f32(r.optional("factor", 1.0)))


def _dynamic(r: Rope) -> RotarySpec:
    """NTK: a text beyond max_position_embeddings raises theta with its length, when it runs."""
    factor, original = r.g.number("factor"), r.c.integer("max_position_embeddings")
    if r.dim == 2:
        raise r.g.error("rope_type", "another type, as dynamic turns 4 channels or more", "dynamic")
    stretch = max(factor * original / original - (factor - 1), 0.0)  # 1 but for rounding
    theta = r.theta * stretch ** (r.dim / (r.dim - 2))
    inv_freq = f32(1) / replace(r, theta=theta).powers()
    return replace(_spec(inv_freq), dynamic=factor, theta=r.theta, original=original)


def _llama3(r: Rope) -> RotarySpec:
    """Llama 3.1: long wavelengths are divided by factor, and short ones are kept.

    Long is beyond original / low_freq_factor, short is below original / high_freq_factor, and what
    lies between is interpolated.
    """
    factor, low, high = (r.g.number(k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise r.g.error("high_freq_factor", f"more than low_freq_factor = {low}", high)
    original, inv_freq = r.original(), f32(1) / r.powers()
    # torch computes number / tensor as the tensor's reciprocal times the number.
    wavelength = f32(1) / inv_freq * f32(2 * math.pi)
    slow = wavelength > f32(original / low)
    fast = wavelength < f32(original / high)
    scaled = np.where(slow, inv_freq / f32(factor), inv_freq)
    smooth = (f32(1) / wavelength * f32(original) - f32(low)) / f32(high - low)
    between = (f32(1) - smooth) * scaled / f32(factor) + smooth * scaled
    return _spec(np.where(~slow & ~fast, between, scaled))


def _yarn(r: Rope) -> RotarySpec:
    """YaRN: fast channels are kept, slow ones divided by factor, with a ramp between them.

    A channel is fast that turns beta_fast times over the original length, and slow that turns
    beta_slow times. cos and sin are scaled by attention_factor, or by what factor, mscale and
    mscale_all_dim ask for.
    """
    factor, original = r.factor_of_lengths(), r.original()
    if r.theta == 1:
        raise r.c.error("rope_theta", "a number other than 1, as the type is yarn", r.theta)
    scale = _yarn_scale(r, factor)

    def channel(turns: float) -> float:
        """The channel that turns so many times over the original length."""
        return r.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(r.theta))

    low, high = channel(r.optional("beta_fast", 32.0)), channel(r.optional("beta_slow", 1.0))
    if r.g.absent("truncate") or r.g.boolean("truncate"):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r.dim - 1)
    width = high - low if high != low else high + 0.001 - low
    ramp = np.clip((np.arange(r.dim // 2).astype(f32) - f32(low)) / f32(width), f32(0), f32(1))
    kept, powers = f32(1) - ramp, r.powers()
    inv_freq = f32(1) / (f32(factor) * powers) * (f32(1) - kept) + f32(1) / powers * kept
    return _spec(inv_freq, scale)


def _yarn_scale(r: Rope, factor: float) -> float:
    if "attention_factor" in r.g:
        return r.g.number("attention_factor")
    over, under = r.optional("mscale", 0.0), r.optional("mscale_all_dim", 0.0)
    return _mscale(factor, over) / _mscale(factor, under) if over and under else _mscale(factor, 1)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(r: Rope) -> RotarySpec:
    """Each frequency has a divisor for texts up to the original length, and another."""
    original, factor = r.original(), r.factor_of_lengths()
    if "attention_factor" in r.g:
        scale = r.g.number("attention_factor")
    else:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short = f32(1) / (_factors(r, "short_factor") * r.powers())
    long = f32(1) / (_factors(r, "long_factor") * r.powers())
    return replace(_spec(short, scale), long_inv_freq=tuple(long.tolist()), original=original)


def _factors(r: Rope, key: str) -> NDArray[np.float32]:
    factors = r.g.finites(key)
    if len(factors) != r.dim // 2:
        raise r.g.error(key, f"{r.dim // 2} numbers, one for two channels", len(factors))
    return np.array(factors, f32)


TYPES: dict[str, Callable[[Rope], RotarySpec]] = {
    "default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn,
    "longrope": _longrope, "proportional": _proportional,
}  # fmt: skip
