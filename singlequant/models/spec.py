# SPDX-License-Identifier: Apache-2.0
"""A model as the decoder runs it: sizes, blocks, and where each tensor lies.

A family's row makes a ModelSpec of config.json (family.py); a packed folder of format version 2
carries one (docs/format.md). Everything behind the checkpoint reads a ModelSpec and no family.
Sizes are in elements. `{i}` in the name of a tensor stands for the layer's index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .config_json import Fields

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
NORM_KINDS = ("rms", "layer")
NORM_PLACES = ("before_attention", "after_attention", "before_mlp", "after_mlp")


@dataclass(frozen=True)
class Role:
    """What a linear is to its layer. This table is the one list of roles.

    outputs and inputs name sizes of `LayerSpec.sizes`. reads: the value that the linear multiplies;
    a norm's place stands for the residual stream behind that norm.
    """

    block: str  # "attention" or "mlp"
    outputs: str
    inputs: str
    reads: str  # "before_attention", "attention", "before_mlp" or "mlp"


ROLES = {
    "q": Role("attention", "queries", "hidden", "before_attention"),
    "k": Role("attention", "keys", "hidden", "before_attention"),
    "v": Role("attention", "keys", "hidden", "before_attention"),
    "o": Role("attention", "hidden", "queries", "attention"),
    "gate": Role("mlp", "intermediate", "hidden", "before_mlp"),
    "up": Role("mlp", "intermediate", "hidden", "before_mlp"),
    "down": Role("mlp", "hidden", "intermediate", "mlp"),
}


def roles_of(block: str) -> tuple[str, ...]:
    """The roles of "attention" or "mlp"."""
    return tuple(role for role, row in ROLES.items() if row.block == block)


def tensor_name(template: str, layer: int) -> str:
    """A template with the layer's index in place of `{i}`."""
    return template.replace("{i}", str(layer))


@dataclass(frozen=True)
class NormSpec:
    """A norm: y = x / rms(x) * (weight + offset), or a LayerNorm, with a bias where it has one."""

    name: str  # of the tensor, without .weight
    kind: str  # one of NORM_KINDS
    eps: float
    offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class LinearSpec:
    """One linear, y = x weight^T + bias with weight [n, k]."""

    name: str  # without .weight; in a packed folder the name of its three tensors
    n: int
    k: int
    bias: bool = False
    stored: str | None = None  # the tensor that holds its rows beside others', if there is one
    first_row: int = 0  # of its rows in `stored`


@dataclass(frozen=True)
class RotarySpec:
    """Rotary embedding of the first `2 * len(inv_freq)` channels of a head."""

    inv_freq: tuple[float, ...]  # rad per position, float32 values
    scale: float = 1.0  # multiplies cos and sin


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention with grouped queries."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # multiplies the scores
    window: int = 0  # tokens that a query sees, itself included; 0: all
    rotary: RotarySpec | None = None


@dataclass(frozen=True)
class MlpSpec:
    """down(activation(gate x) * up x), or down(activation(up x)) without a gate."""

    activation: str  # one of ACTIVATIONS
    intermediate: int


@dataclass(frozen=True)
class Site:
    """The linears of a layer that read one value, and so share its rotation and its codes.

    reads: where the value comes from: the "residual" stream, "attention" (its output) or "mlp" (the
    inputs of its last linear). producer: what makes the value channel by channel, so that a factor
    per channel folds into it for nothing: a norm's place, the role of a linear whose rows do, or
    None.
    """

    name: str
    roles: tuple[str, ...]
    k: int
    reads: str
    producer: str | None


@dataclass(frozen=True)
class LayerSpec:
    """One kind of decoder layer. `parallel`: attention and MLP read one norm of the same input."""

    hidden: int
    attention: AttentionSpec
    mlp: MlpSpec
    norms: Mapping[str, NormSpec]  # by place
    linears: Mapping[str, LinearSpec]  # by role, in the order of ROLES
    parallel: bool = False
    residual_scale: float = 1.0

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The sites by name, in the order in which the layer runs."""
        groups: dict[str, list[str]] = {}
        for role in self.linears:
            groups.setdefault(self._value(ROLES[role].reads), []).append(role)
        sites = (self._site(value, tuple(roles)) for value, roles in groups.items())
        return {site.name: site for site in sites}

    def require_sites(self, what: str, names: Iterable[str]) -> None:
        """ValueError that starts with `what` for a name that is no site of the layer."""
        unknown = [name for name in names if name not in self.sites]
        if unknown:
            raise ValueError(f"{what}: expected keys among {', '.join(self.sites)}, "
                             f"found {unknown[0]!r}")

    def _value(self, reads: str) -> str:
        """What a role reads: in a parallel layer without a norm of its own the MLP's input is
        attention's."""
        shared = self.parallel and reads == "before_mlp" and reads not in self.norms
        return "before_attention" if shared else reads

    def _site(self, value: str, roles: tuple[str, ...]) -> Site:
        """The site of these roles. Its name joins theirs: "qkv", "gate_up"."""
        letters = "".join(role for role in roles if len(role) == 1)
        name = "_".join([*([letters] if letters else []), *(r for r in roles if len(r) > 1)])
        k = self.linears[roles[0]].k
        if value in NORM_PLACES:
            return Site(name, roles, k, "residual", value if value in self.norms else None)
        return Site(name, roles, k, value, self._rows_behind(value))

    def _rows_behind(self, value: str) -> str | None:
        """The role whose rows scale the value: v's for attention's output; up's for the MLP's if it
        is gated or its activation passes factors above 0."""
        if value == "attention":
            return "v"
        return "up" if "gate" in self.linears or self.mlp.activation == "relu" else None


def layer_sizes(hidden: int, attention: AttentionSpec, mlp: MlpSpec) -> dict[str, int]:
    """The sizes that ROLES names."""
    a = attention
    return {"hidden": hidden, "queries": a.heads * a.head_dim, "keys": a.kv_heads * a.head_dim,
            "intermediate": mlp.intermediate}


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: `layers` layers, each of one of `kinds`, between an embedding and a head."""

    family: str  # config.json's architectures[0]
    hidden: int
    vocab: int
    layers: int
    max_position_embeddings: int
    embed: str  # name of the tensor [vocab, hidden], without .weight
    head: str
    tied: bool  # the head is the embedding
    final_norm: NormSpec
    kinds: tuple[LayerSpec, ...]
    pattern: tuple[int, ...] = (0,)  # layer i is of kind pattern[i % len(pattern)]

    def layer(self, i: int) -> LayerSpec:
        """The description of layer i."""
        return self.kinds[self.pattern[i % len(self.pattern)]]

    @property
    def attention(self) -> AttentionSpec:
        """The first layer's attention, whose heads and head_dim the KV cache takes."""
        return self.layer(0).attention

    def site_names(self) -> tuple[str, ...]:
        """Names of all sites, in the order in which a layer runs."""
        return tuple(dict.fromkeys(name for kind in self.kinds for name in kind.sites))

    @property
    def parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        head = 0 if self.tied else self.vocab * self.hidden
        whole, rest = divmod(self.layers, len(self.pattern))
        counts = [whole * self.pattern.count(kind) + self.pattern[:rest].count(kind)
                  for kind in range(len(self.kinds))]
        return (self.vocab * self.hidden + head + _norm_weights(self.final_norm, self.hidden)
                + sum(n * _layer_weights(kind) for n, kind in zip(counts, self.kinds, strict=True)))

    def separate(self) -> ModelSpec:
        """The same model with every linear stored by itself, as packed folders have them."""
        kinds = tuple(
            replace(kind, linears={role: replace(linear, stored=None, first_row=0)
                                   for role, linear in kind.linears.items()})
            for kind in self.kinds
        )
        return replace(self, kinds=kinds)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor of an unquantized folder: outer ones, then by layer."""
        yield f"{self.embed}.weight", (self.vocab, self.hidden)
        yield from _norm_tensors(self.final_norm.name, self.final_norm, self.hidden)
        if not self.tied:
            yield f"{self.head}.weight", (self.vocab, self.hidden)
        for i in range(self.layers):
            yield from self.layer_tensors(i)

    def layer_tensors(self, i: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of the tensors of layer i: norms, then linears; fused ones once."""
        layer = self.layer(i)
        for norm in layer.norms.values():
            yield from _norm_tensors(tensor_name(norm.name, i), norm, self.hidden)
        fused: dict[str, list[LinearSpec]] = {}
        for linear in layer.linears.values():
            fused.setdefault(linear.stored or linear.name, []).append(linear)
        for template, linears in fused.items():
            name, n = tensor_name(template, i), sum(linear.n for linear in linears)
            yield f"{name}.weight", (n, linears[0].k)
            if linears[0].bias:
                yield f"{name}.bias", (n,)

    def to_json(self) -> dict[str, Any]:
        """JSON values of all fields and of the sites; `from_fields` takes them back.

        Each linear stands by itself, as a packed folder stores it.
        """
        values = dataclasses.asdict(self)
        for kind, layer in zip(values["kinds"], self.kinds, strict=True):
            for linear in kind["linears"].values():
                del linear["stored"], linear["first_row"]
            kind["sites"] = {name: list(site.roles) for name, site in layer.sites.items()}
        return values

    @classmethod
    def from_fields(cls, f: Fields) -> ModelSpec:
        """The spec of a packed folder. FormatError names the key, the expected and the found."""
        spec = cls(
            family=f.string("family"), hidden=f.integer("hidden"), vocab=f.integer("vocab"),
            layers=f.integer("layers"),
            max_position_embeddings=f.integer("max_position_embeddings"),
            embed=f.string("embed"), head=f.string("head"), tied=f.boolean("tied"),
            final_norm=_norm(f.object("final_norm")),
            kinds=tuple(_layer(kind, f.integer("hidden")) for kind in f.objects("kinds")),
            pattern=tuple(f.integers("pattern", 0)),
        )
        if not spec.pattern or max(spec.pattern) >= len(spec.kinds):
            raise f.error("pattern", f"indices of {len(spec.kinds)} kinds")
        names = (entry.name for kind in spec.kinds
                 for entry in (*kind.norms.values(), *kind.linears.values()))
        if spec.layers > len(spec.pattern) and not all("{i}" in name for name in names):
            raise f.error("layers", f"at most {len(spec.pattern)}, as a name of the layers has no "
                                    "{i} that tells one from the next")
        f.require_no_others()
        return spec


def _norm_tensors(
    name: str, norm: NormSpec, hidden: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (hidden,)
    if norm.bias:
        yield f"{name}.bias", (hidden,)


def _norm_weights(norm: NormSpec, hidden: int) -> int:
    return hidden * (2 if norm.bias else 1)


def _layer_weights(layer: LayerSpec) -> int:
    """Number of weights of a layer."""
    linears = sum(x.n * x.k + (x.n if x.bias else 0) for x in layer.linears.values())
    return linears + sum(_norm_weights(norm, layer.hidden) for norm in layer.norms.values())


# ---- reading what to_json wrote -----------------------------------------------------------------


def _norm(f: Fields) -> NormSpec:
    norm = NormSpec(f.string("name"), f.choice("kind", NORM_KINDS), f.number("eps"),
                    f.finite("offset"), f.boolean("bias"))
    f.require_no_others()
    return norm


def _layer(f: Fields, hidden: int) -> LayerSpec:
    attention, mlp = _attention(f.object("attention")), _mlp(f.object("mlp"))
    sizes = layer_sizes(hidden, attention, mlp)
    norms, linears = f.object("norms"), f.object("linears")
    gated = "gate" in linears
    layer = LayerSpec(
        hidden=f.integer("hidden"), attention=attention, mlp=mlp,
        norms={place: _norm(norms.object(place)) for place in NORM_PLACES if place in norms},
        linears={role: _linear(linears.object(role), row, sizes) for role, row in ROLES.items()
                 if gated or role != "gate"},
        parallel=f.boolean("parallel"), residual_scale=f.finite("residual_scale"),
    )
    if layer.hidden != hidden:
        raise f.error("hidden", f"the model's {hidden}")
    sites = f["sites"]
    expected = {name: list(site.roles) for name, site in layer.sites.items()}
    if sites != expected:
        raise f.error("sites", f"{expected}, as the blocks ask for")
    for fields in (norms, linears, f):
        fields.require_no_others()
    return layer


def _linear(f: Fields, role: Role, sizes: Mapping[str, int]) -> LinearSpec:
    linear = LinearSpec(f.string("name"), f.integer("n"), f.integer("k"), f.boolean("bias"))
    for key, expected in (("n", sizes[role.outputs]), ("k", sizes[role.inputs])):
        if getattr(linear, key) != expected:
            raise f.error(key, f"{expected}, as the blocks ask for")
    f.require_no_others()
    return linear


def _attention(f: Fields) -> AttentionSpec:
    heads, kv_heads, head_dim = (f.integer(key) for key in ("heads", "kv_heads", "head_dim"))
    if heads % kv_heads:
        raise f.error("kv_heads", f"a divisor of heads = {heads}")
    rotary = None if f.absent("rotary") else _rotary(f.object("rotary"), head_dim)
    attention = AttentionSpec(heads, kv_heads, head_dim, f.finite("scale"), f.integer("window", 0),
                              rotary)
    f.require_no_others()
    return attention


def _rotary(f: Fields, head_dim: int) -> RotarySpec:
    rotary = RotarySpec(tuple(f.finites("inv_freq")), f.finite("scale"))
    if not 1 <= len(rotary.inv_freq) <= head_dim // 2:
        raise f.error("inv_freq", f"1 to {head_dim // 2} frequencies", len(rotary.inv_freq))
    f.require_no_others()
    return rotary


def _mlp(f: Fields) -> MlpSpec:
    mlp = MlpSpec(f.choice("activation", ACTIVATIONS), f.integer("intermediate"))
    f.require_no_others()
    return mlp
