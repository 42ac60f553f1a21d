# SPDX-License-Identifier: Apache-2.0
"""What a family's row is made of: rules that read config.json, and parts such as norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config_json import Fields

# A number of a row: the value itself, a key of config.json (off where it is null, false or 0), or a
# function of config.json.
Rule = Any


def value(c: Fields, rule: Rule, default: Any = None) -> Any:
    """What a rule gives; a key's number lies in 1e-30 to 1e30. default where the rule is off."""
    if isinstance(rule, str):
        return c.number(rule) if c[rule] else default
    found = rule(c) if callable(rule) else rule
    return default if found is None else found


def count(c: Fields, rule: Rule, default: int) -> int:
    """What a rule of a whole number gives; default where it is off."""
    return c.integer_or(rule, default) if isinstance(rule, str) else value(c, rule, default)


def switch(c: Fields, rule: Rule) -> bool:
    """Whether a rule is on; a key holds true or false."""
    if isinstance(rule, str):
        return bool(c[rule]) and c.boolean(rule)
    return bool(value(c, rule, False))


@dataclass(frozen=True)
class Stored:
    """A tensor that holds the rows of several roles one after the other, such as a fused qkv.

    name and bias: whole names, with `.weight`. blocks: "kv_heads" or "intermediate" equal blocks of
    rows, in each of which the roles follow each other; "": one. With experts, a stack of them.
    """

    name: str
    roles: tuple[str, ...]
    bias: str | None = None
    blocks: str = ""
    transposed: bool = False  # [k, rows]


@dataclass(frozen=True)
class Norm:
    """How a family's norms compute. eps: the key of config.json. offset is added to the weight."""

    kind: str = "rms"
    eps: str | float = "rms_norm_eps"
    offset: float = 0.0
    bias: Rule = False
    weight: Rule = True  # False: 1 in every channel, and no tensor


@dataclass(frozen=True)
class HeadNorms:
    """Norms of q and k. shape: "head" shares one weight, "heads" has a row for each head, "whole"
    is one norm over all heads."""

    name: str  # without .weight, with `{role}`
    shape: str = "head"
    norm: Norm | None = None  # None: as the family's other norms


@dataclass(frozen=True)
class Rotary:
    """Arguments of rope.rotary_spec, which a family's config.json may spell its own way."""

    interleaved: Rule = False
    theta_key: str = "rope_theta"
    partial_key: str | None = None  # None: whole heads turn
    by_kind: bool = False  # each kind of layer has parameters of its own
    local_theta: str | None = None  # key of the base of sliding layers (Gemma 3)
    dim: Rule = None  # channels that turn, outright


@dataclass(frozen=True)
class Experts:
    """The experts of a family. Strings are keys of config.json, or names of tensors."""

    router: str  # without .weight
    each: Mapping[str, str]  # by role, or "mlp" with `{role}`; with `{e}`; {}: always stacked
    stacks: tuple[tuple[Stored, ...], ...] = ()  # other ways to store them: whole names
    count: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    intermediate: str = "moe_intermediate_size"
    scoring: Rule = lambda c: "softmax"
    normalize: Rule = True
    scale: Rule = 1.0
    groups: Rule = 1
    chosen_groups: Rule = 1
    group_score: str = "max"
    router_bias: str | None = None  # whole name
    correction: str | None = None  # whole name
    activation: str | None = None  # in place of hidden_act's
    limit: Rule = 0.0
    shared: Rule = 0  # width of the shared expert; 0: none
    shared_linears: str = ""  # template with `{role}`
    shared_fused: tuple[Stored, ...] = ()  # tensors in their place
    shared_router: str | None = None  # whole name
