# SPDX-License-Identifier: Apache-2.0
"""A model as the decoder runs it: sizes, blocks, and where each tensor lies.

A family's row makes a ModelSpec of config.json (family.py); a packed folder carries one
(spec_json.py, docs/format.md). Everything behind the checkpoint reads a ModelSpec and no family.
Sizes are in elements. In the name of a tensor `{i}` stands for the layer's index, `{e}` for the
expert's and `{h}` for the head's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu", "swiglu_clamped")
NORM_KINDS = ("rms", "layer")
NORM_PLACES = ("before_attention", "after_attention", "before_mlp", "after_mlp")  # of the residual
INNER_NORMS = ("q_norm", "k_norm", "q_a_norm", "kv_a_norm")  # inside attention
SCORINGS = ("softmax", "sigmoid", "chosen")
GROUP_SCORES = ("max", "top2")
MOST_EXPERTS = 4096  # of a layer; far beyond any model, and few enough to name each


@dataclass(frozen=True)
class Role:
    """What a linear is to its layer. This table is the one list of roles.

    outputs and inputs name sizes of `layer_sizes`. reads: the value that the linear multiplies; a
    norm's place stands for what comes out of that norm. A layer with experts has the roles of its
    experts with the expert's number behind them: "up.17".
    """

    block: str  # "attention", "mlp" or "shared": the expert that every token takes
    outputs: str
    inputs: str
    reads: str  # a norm's place, or "attention", "mlp" or "shared": the inputs of its last linear


ROLES = {
    "q": Role("attention", "queries", "hidden", "before_attention"),
    "q_a": Role("attention", "q_rank", "hidden", "before_attention"),
    "k": Role("attention", "keys", "hidden", "before_attention"),
    "v": Role("attention", "values", "hidden", "before_attention"),
    "kv_a": Role("attention", "kv_rank_rope", "hidden", "before_attention"),
    "q_b": Role("attention", "queries", "q_rank", "q_a_norm"),
    "kv_b": Role("attention", "expanded", "kv_rank", "kv_a_norm"),
    "o": Role("attention", "hidden", "mixed", "attention"),
    "shared_gate": Role("shared", "shared", "hidden", "before_mlp"),
    "shared_up": Role("shared", "shared", "hidden", "before_mlp"),
    "shared_down": Role("shared", "hidden", "shared", "shared"),
    "gate": Role("mlp", "intermediate", "hidden", "before_mlp"),
    "up": Role("mlp", "intermediate", "hidden", "before_mlp"),
    "down": Role("mlp", "hidden", "intermediate", "mlp"),
}


def roles_of(block: str) -> tuple[str, ...]:
    """The roles of "attention", "mlp" or "shared"."""
    return tuple(role for role, row in ROLES.items() if row.block == block)


def role_row(role: str) -> Role:
    """The row of a role, with or without an expert's number. KeyError if there is none."""
    return ROLES[role.partition(".")[0]]


def expert_of(role: str) -> int | None:
    """17 for "up.17"; None for a role of the whole layer."""
    number = role.partition(".")[2]
    return int(number) if number else None


def tensor_name(template: str, layer: int, expert: int | None = None) -> str:
    """A template with the layer's and the expert's index in place of `{i}` and `{e}`."""
    name = template.replace("{i}", str(layer))
    return name if expert is None else name.replace("{e}", str(expert))


def optional(default: Any, **checks: Any) -> Any:
    """A field that JSON holds only where it differs from its default; checks: see spec_json."""
    return dataclasses.field(default=default, metadata={"optional": True, **checks})


def checked(default: Any = dataclasses.MISSING, **checks: Any) -> Any:
    """A field that JSON always holds; checks: see spec_json."""
    return dataclasses.field(default=default, metadata=checks)


@dataclass(frozen=True)
class NormSpec:
    """A norm: y = x / rms(x) * (weight + offset), or a LayerNorm, with a bias where it has one.

    shape: of weight and bias; () is [hidden] at a place of the residual stream and the rank in
    latent attention. For q and k [head_dim] serves every head, [heads, head_dim] has a row for
    each, and [heads * head_dim] is one norm over all of them.
    """

    name: str  # of the tensor, without .weight; with `{h}` a tensor for each row
    kind: str = checked(choices=NORM_KINDS)
    eps: float = checked(positive=True)
    offset: float = 0.0
    bias: bool = False
    shape: tuple[int, ...] = optional(())
    weight: bool = optional(True)  # False: 1 in every channel, and no tensor

    def tensors(self, layer: int, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of its tensors; size: of the value where shape is ()."""
        shape, name = self.shape or (size,), tensor_name(self.name, layer)
        names = [name]
        if "{h}" in name:
            names, shape = [name.replace("{h}", str(h)) for h in range(shape[0])], shape[1:]
        for one in names:
            if self.weight:
                yield f"{one}.weight", shape
            if self.bias:
                yield f"{one}.bias", shape


@dataclass(frozen=True)
class LinearSpec:
    """One linear, y = x weight^T + bias with weight [n, k].

    Where `stored` is set, a tensor of that whole name holds its rows beside others': of [N, k], or
    [k, N] if transposed, or with the experts in front. Its N rows are `blocks` equal blocks; the
    linear has rows first_row .. first_row + n / blocks - 1 of each block.
    """

    name: str  # without .weight; in a packed folder the name of its three tensors
    n: int
    k: int
    bias: bool = False
    stored: str | None = None
    stored_bias: str | None = None
    first_row: int = 0
    blocks: int = 1
    transposed: bool = False
    experts: int = 0  # in `stored`; 0: it is no stack of them
    rows: int = 0  # N of `stored`; 0: n
    expert: int | None = None

    def at(self, layer: int) -> str:
        """Its name in a layer."""
        return tensor_name(self.name, layer, self.expert)

    def tensors(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of the tensors that hold it."""
        stack = (self.experts,) if self.experts else ()
        n = self.rows or self.n
        yield self.weight_name(layer), stack + ((self.k, n) if self.transposed else (n, self.k))
        if self.bias:
            yield self.bias_name(layer), (*stack, n)

    def weight_name(self, layer: int) -> str:
        """The tensor that holds its weight."""
        return tensor_name(self.stored or f"{self.name}.weight", layer, self.expert)

    def bias_name(self, layer: int) -> str:
        """The tensor that holds its bias."""
        return tensor_name(self.stored_bias or f"{self.name}.bias", layer, self.expert)


@dataclass(frozen=True)
class DenseSpec:
    """A tensor of a layer that is never quantized, such as a router."""

    name: str  # whole
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RotarySpec:
    """Rotary embedding of the first `2 * len(inv_freq)` channels of a head (latent: the last).

    Pairs are channels i and i + len(inv_freq), or 2 i and 2 i + 1 if interleaved. A token takes
    long_inv_freq, or the frequencies that the factor `dynamic` makes of theta, where its sequence
    is longer than `original` positions in the call.
    """

    inv_freq: tuple[float, ...]  # rad per position, float32 values
    scale: float = 1.0  # multiplies cos and sin
    interleaved: bool = optional(False)
    long_inv_freq: tuple[float, ...] = optional(())
    dynamic: float = optional(0.0)
    theta: float = optional(0.0)
    original: int = optional(0, least=0)


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention with grouped queries.

    With q_rank or kv_rank it is latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # multiplies the scores
    window: int = checked(0, least=0)  # tokens that a query sees, itself included; 0: all
    rotary: RotarySpec | None = None
    softcap: float = optional(0.0)  # c of c tanh(score / c); 0: none
    slopes: tuple[float, ...] = optional(())  # of ALiBi, by head
    slopes_bfloat16: bool = optional(False)  # scale * bfloat16(slope * position of the key)
    qkv_clip: float = optional(0.0)  # largest magnitude of q, k and v; 0: none
    query_growth: float = optional(0.0)  # q times 1 + growth ln(1 + floor(position / original))
    query_original: int = optional(0, least=0)
    value_dim: int = optional(0, least=0)  # channels of a value head; 0: head_dim
    q_rank: int = optional(0, least=0)
    kv_rank: int = optional(0, least=0)

    @property
    def value_channels(self) -> int:
        """Channels of a value head."""
        return self.value_dim or self.head_dim


@dataclass(frozen=True)
class MlpSpec:
    """down(activation(gate x) * up x), or down(activation(up x)) without a gate."""

    activation: str = checked(choices=ACTIVATIONS)
    intermediate: int = checked()
    limit: float = optional(0.0)  # of swiglu_clamped


@dataclass(frozen=True)
class ExpertsSpec:
    """`chosen` of `count` MLPs for each token, and perhaps one that every token takes.

    scoring: "softmax" or "sigmoid" of the router's logits, or "chosen": softmax over the chosen
    logits. normalize: divide the chosen weights by their sum. Experts are chosen in the best
    `chosen_groups` of `groups` equal groups, a group's score being its largest or the sum of its
    two largest.
    """

    count: int
    chosen: int
    activation: str = checked(choices=ACTIVATIONS)
    intermediate: int = checked()
    scoring: str = optional("softmax", choices=SCORINGS)
    normalize: bool = optional(False)
    scale: float = optional(1.0)
    groups: int = optional(1)
    chosen_groups: int = optional(1)
    group_score: str = optional("max", choices=GROUP_SCORES)
    limit: float = optional(0.0)  # of swiglu_clamped
    shared_intermediate: int = optional(0, least=0)  # 0: no shared expert


@dataclass(frozen=True)
class Site:
    """The linears of a layer that read one value, and so share its rotation and its codes.

    reads: where the value comes from: the "residual" stream, a "latent" of attention, "attention"
    (its output) or "mlp" (the inputs of its last linear). producer: what makes the value channel by
    channel, so that a factor per channel folds into it for nothing: a norm's place, the role of a
    linear whose rows do, or None. expert: whose tokens alone it sees; None: all of them.
    """

    name: str
    roles: tuple[str, ...]
    k: int
    reads: str
    producer: str | None
    expert: int | None = None
    norm: str | None = None  # the place of the norm that is read, whether it folds or not


@dataclass(frozen=True)
class LayerSpec:
    """One kind of decoder layer. `parallel`: attention and MLP read one norm of the same input."""

    hidden: int
    attention: AttentionSpec
    mlp: MlpSpec | None  # None: the layer has experts
    norms: Mapping[str, NormSpec]  # by place
    linears: Mapping[str, LinearSpec]  # by role, in the order of ROLES, expert by expert
    parallel: bool = False
    residual_scale: float = 1.0
    norm_sums: bool = optional(False)  # norms behind a branch are of the sum with the residual
    experts: ExpertsSpec | None = optional(None)
    dense: Mapping[str, DenseSpec] = dataclasses.field(
        default_factory=dict, metadata={"optional": True})  # see DENSE

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The sites by name, in the order in which the layer runs."""
        groups: dict[tuple[str, int | None], list[str]] = {}
        for role in self.linears:
            groups.setdefault((self._value(role_row(role).reads), expert_of(role)), []).append(role)
        sites = (self._site(value, expert, tuple(roles))
                 for (value, expert), roles in groups.items())
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

    def _site(self, value: str, expert: int | None, roles: tuple[str, ...]) -> Site:
        """The site of these roles. Its name joins theirs: "qkv", "gate_up", "gate_up.17"."""
        k, end = self.linears[roles[0]].k, "" if expert is None else f".{expert}"
        name = _joined(role.partition(".")[0] for role in roles) + end
        if value in (*NORM_PLACES, *INNER_NORMS):
            reads = "residual" if value in NORM_PLACES else "latent"
            norm = value if value in self.norms else None
            return Site(name, roles, k, reads, self._norm_behind(value), expert, norm)
        rows = self._rows_behind(value)
        reads = "attention" if value == "attention" else "mlp"
        return Site(name, roles, k, reads, None if rows is None else rows + end, expert)

    def _norm_behind(self, value: str) -> str | None:
        """The norm of that place, if nothing but one site reads what comes out of it."""
        routed = self.experts is not None and value == self._value("before_mlp")
        folds = value in self.norms and self.norms[value].weight and not routed
        return value if folds else None

    def _rows_behind(self, value: str) -> str | None:
        """The role whose rows scale the value: v's for attention's output; up's for the MLP's if it
        is gated or its activation passes factors above 0."""
        if value == "attention":
            return "v" if "v" in self.linears and not self.attention.qkv_clip else None
        mlp = self.mlp or self.experts
        up = "shared_up" if value == "shared" else "up"
        if mlp.activation == "swiglu_clamped":
            return None
        gated = any(role.partition(".")[0] == "gate" for role in self.linears)
        return up if gated or mlp.activation == "relu" else None


def _joined(roles: Iterable[str]) -> str:
    """The name of a site: letters first, and what the roles share once."""
    roles = list(roles)
    if len(roles) > 1 and all(role.startswith("shared_") for role in roles):
        return "shared_" + _joined(role.removeprefix("shared_") for role in roles)
    letters = "".join(role for role in roles if len(role) == 1)
    return "_".join([*([letters] if letters else []), *(r for r in roles if len(r) > 1)])


def layer_sizes(
    hidden: int, attention: AttentionSpec, mlp: MlpSpec | None, experts: ExpertsSpec | None = None
) -> dict[str, int]:
    """The sizes that ROLES names."""
    a, block = attention, mlp or experts
    turned = 2 * len(a.rotary.inv_freq) if a.rotary else 0
    return {
        "hidden": hidden, "queries": a.heads * a.head_dim, "keys": a.kv_heads * a.head_dim,
        "values": a.kv_heads * a.value_channels, "mixed": a.heads * a.value_channels,
        "q_rank": a.q_rank, "kv_rank": a.kv_rank, "kv_rank_rope": a.kv_rank + turned,
        "expanded": a.heads * (a.head_dim - turned + a.value_channels),
        "intermediate": block.intermediate,
        "shared": experts.shared_intermediate if experts else 0,
    }  # fmt: skip


def norm_channels(place: str, norm: NormSpec, hidden: int, attention: AttentionSpec) -> int:
    """Channels of a norm at a place whose own shape is ()."""
    sizes = {"q_norm": attention.head_dim, "k_norm": attention.head_dim,
             "q_a_norm": attention.q_rank, "kv_a_norm": attention.kv_rank}
    return prod(norm.shape) if norm.shape else sizes.get(place, hidden)


@dataclass(frozen=True)
class PositionsSpec:
    """Learned positions, added to the embedding: row position + offset of a table."""

    name: str  # of the tensor, without .weight
    rows: int
    offset: int = checked(least=0)


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
    final_norm: NormSpec | None
    kinds: tuple[LayerSpec, ...]
    pattern: tuple[int, ...] = checked((0,), least=0)  # layer i is of kind pattern[i % length]
    embed_scale: float = optional(1.0)  # multiplies the rows of the embedding
    embed_norm: NormSpec | None = optional(None)  # of the embedding's rows
    embed_width: int = optional(0, least=0)  # of embedding and head; 0: hidden
    project_in: str | None = optional(None)  # linear [hidden, embed_width] behind the embedding
    project_out: str | None = optional(None)  # linear [embed_width, hidden] before the head
    positions: PositionsSpec | None = optional(None)
    head_bias: bool = optional(False)
    logit_scale: float = optional(1.0)  # multiplies the logits
    logit_softcap: float = optional(0.0)  # c of c tanh(logit / c); 0: none

    def layer(self, i: int) -> LayerSpec:
        """The description of layer i."""
        return self.kinds[self.pattern[i % len(self.pattern)]]

    @property
    def width(self) -> int:
        """Channels of the embedding and of what the head reads."""
        return self.embed_width or self.hidden

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
        whole, rest = divmod(self.layers, len(self.pattern))
        counts = [whole * self.pattern.count(kind) + self.pattern[:rest].count(kind)
                  for kind in range(len(self.kinds))]
        sizes = [sum(prod(shape) for _, shape in self._kind_tensors(kind, 0))
                 for kind in self.kinds]
        outer = sum(prod(shape) for _, shape in self.outer_tensors())
        return outer + sum(n * size for n, size in zip(counts, sizes, strict=True))

    def separate(self) -> ModelSpec:
        """The same model with every linear stored by itself, as packed folders have them."""
        kinds = tuple(
            replace(kind, linears={
                role: LinearSpec(x.name, x.n, x.k, x.bias, expert=x.expert)
                for role, x in kind.linears.items()})
            for kind in self.kinds
        )
        return replace(self, kinds=kinds)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor of an unquantized folder: outer ones, then by layer."""
        yield from self.outer_tensors()
        for i in range(self.layers):
            yield from self.layer_tensors(i)

    def outer_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of the tensors outside the layers."""
        yield f"{self.embed}.weight", (self.vocab, self.width)
        if self.positions:
            yield f"{self.positions.name}.weight", (self.positions.rows, self.hidden)
        for norm in (self.embed_norm, self.final_norm):
            if norm:
                yield from norm.tensors(0, self.hidden)
        if self.project_in:
            yield f"{self.project_in}.weight", (self.hidden, self.width)
        if self.project_out:
            yield f"{self.project_out}.weight", (self.width, self.hidden)
        if not self.tied:
            yield f"{self.head}.weight", (self.vocab, self.width)
        if self.head_bias:
            yield f"{self.head}.bias", (self.vocab,)

    def layer_tensors(self, i: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of the tensors of layer i: norms, dense ones, then linears, each once."""
        yield from self._kind_tensors(self.layer(i), i)

    def _kind_tensors(
        self, layer: LayerSpec, i: int
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        for place, norm in layer.norms.items():
            yield from norm.tensors(i, norm_channels(place, norm, self.hidden, layer.attention))
        for tensor in layer.dense.values():
            yield tensor_name(tensor.name, i), tensor.shape
        # a tensor that several linears share comes once
        yield from dict(pair for x in layer.linears.values() for pair in x.tensors(i)).items()
