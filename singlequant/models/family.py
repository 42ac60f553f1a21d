# SPDX-License-Identifier: Apache-2.0
"""A family of models as a row: what config.json means, and where the tensors lie.

`Family.spec` makes a ModelSpec of a row and a config.json: sites and producers follow from there
(spec.py). docs/adding-a-family.md tells how a row is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .config_json import HARMLESS, Fields
from .parts import Experts, Norm, Rotary, Rule, Stored, count, switch, value
from .rope import FULL, SLIDING, rotary_spec
from .spec import (
    MOST_EXPERTS,
    ROLES,
    AttentionSpec,
    DenseSpec,
    ExpertsSpec,
    LayerSpec,
    LinearSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    PositionsSpec,
    RotarySpec,
    layer_sizes,
    roles_of,
    tensor_name,
)

ROOT = "model.layers.{i}."  # where most families keep a layer
# Where layers may slide, the row's rule or layer_types says which of these count.
WINDOW_KEYS = ("sliding_window", "sliding_window_pattern", "use_sliding_window",
               "max_window_layers")
LARGEST_HEAD = 65536  # channels; far beyond any model, and small enough to make its frequencies
MOST_LAYERS = 4096  # of a family whose layers differ: each is looked at
MOST_HEADS = 65536

Has = Callable[[str], bool]  # whether the folder has a tensor of that name

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu",
               "relu2": "relu2", "quick_gelu": "quick_gelu"}  # hidden_act -> activation


@dataclass(frozen=True)
class Family:
    """One row. `{i}` in a template is the layer's index, `{role}` the linear's role."""

    name: str  # config.json's architectures[0]
    aliases: tuple[str, ...] = ()  # other names of the same class
    wrappers: tuple[str, ...] = ()  # architectures whose text_config is of this family
    # usual key -> the family's own; of several the first counts, and the others mean the same
    keys: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    # What transformers' config class assumes where config.json is silent.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored_keys: tuple[str, ...] = ()  # of config.json: the family's code does not read them
    respelled: Mapping[str, str] = field(default_factory=dict)  # part of a name -> as the row says
    # outside the layers
    embed: str = "model.embed_tokens"
    embed_scale: Rule = 1.0
    embed_norm: str | None = None
    embed_width: Rule = 0
    project: tuple[str, str] | None = None  # behind the embedding and before the head
    positions: str | None = None
    position_offset: int = 0
    final_norm: str | Callable[[Fields], str | None] = "model.norm"
    head: str = "lm_head"
    head_bias: bool = False
    logit_scale: Rule = 1.0
    logit_softcap: Rule = 0.0
    # layers
    norm: Norm = Norm()
    norms: Rule = field(default_factory=dict)  # tensor by place; see NORM_PLACES
    head_norms: Rule = None  # HeadNorms
    linears: Mapping[str, str] = field(default_factory=dict)  # by role, or block with `{role}`
    fused: tuple[Stored, ...] = ()  # tensors that stand in place of some of `linears`
    biases: Rule = ()  # roles that always have a bias
    bias_keys: Mapping[str, Any] = field(default_factory=dict)  # key -> block or roles with biases
    gated: bool = True
    intermediate: Rule = "intermediate_size"
    norm_sums: Rule = False  # norms behind a branch are of the sum with the residual stream
    activations: Mapping[str, str] = field(default_factory=lambda: ACTIVATIONS)
    parallel: Rule = False
    residual_scale: Rule = 1.0
    experts: Experts | None = None
    # attention
    kv_heads: Rule = "num_key_value_heads"
    head_dim: Rule = "head_dim"
    scale: Rule = None  # of the scores; None: 1 / sqrt(head_dim)
    softcap: Rule = 0.0
    qkv_clip: Rule = 0.0
    slopes: Rule = None  # function of config.json: ALiBi's, by head
    slopes_before_scale: bool = False  # added before the scores are scaled, rounded to bfloat16
    sinks: str | None = None  # whole name
    query_growth: Rule = None  # function of config.json: (beta, original), see AttentionSpec
    latent: bool = False
    rotary: Rotary | None = Rotary()
    # what layers differ in: functions of config.json and the layer's index
    sliding: Callable[[Fields, int], bool] | None = None  # sees `sliding_window` tokens
    unrotated: Callable[[Fields, int], bool] | None = None  # no rotary embedding
    routed: Callable[[Fields, int], bool] | None = None  # experts; None: all layers, if any

    def spec(
        self, config: Mapping[str, Any], source: str = "config.json", has: Has = lambda name: False
    ) -> ModelSpec:
        """The model that config.json describes, stored as the tensors' names show.

        FormatError names the key, what was expected and what was found. A key that is on and that
        neither this row nor HARMLESS knows is refused: it may change the result.
        """
        c = self._fields(config, source)
        kinds, pattern = self._kinds(c, has)
        spec = replace(self._outer(c), kinds=kinds, pattern=pattern)
        c.require_no_others((*HARMLESS, *self.ignored_keys,
                             *(WINDOW_KEYS if self.sliding else ()),
                             *(("intermediate_size",) if self.experts else ())))
        return spec

    def _fields(self, config: Mapping[str, Any], source: str) -> Fields:
        """config.json with the family's defaults, read by the usual keys."""
        names, values = {}, dict(config)
        for usual, own in self.keys.items():
            first, *others = (own,) if isinstance(own, str) else own
            names[usual] = first
            for other in (name for name in (*others, usual) if name != first and name in values):
                found = values.pop(other)
                values.setdefault(first, found)
        return Fields(values, source, names=names, defaults=self.defaults)

    # ---- outside the layers ---------------------------------------------------------------------

    def _outer(self, c: Fields) -> ModelSpec:
        """The model without its layers."""
        hidden, length = c.integer("hidden_size"), c.integer("max_position_embeddings")
        width = count(c, self.embed_width, 0)
        width = 0 if width == hidden else width
        project_in, project_out = self.project if self.project and width else (None, None)
        rows = length + self.position_offset
        final = self.final_norm(c) if callable(self.final_norm) else self.final_norm
        return ModelSpec(
            family=self.name, hidden=hidden, vocab=c.integer("vocab_size"),
            layers=c.integer("num_hidden_layers"), max_position_embeddings=length,
            embed=self.embed, head=self.head, tied=c.boolean("tie_word_embeddings"),
            final_norm=self._norm(c, final) if final else None, kinds=(),
            embed_scale=float(value(c, self.embed_scale, 1.0)),
            embed_norm=self._norm(c, self.embed_norm) if self.embed_norm else None,
            embed_width=width, project_in=project_in, project_out=project_out,
            positions=(PositionsSpec(self.positions, rows, self.position_offset)
                       if self.positions else None),
            head_bias=self.head_bias,
            logit_scale=float(value(c, self.logit_scale, 1.0)),
            logit_softcap=float(value(c, self.logit_softcap, 0.0)),
        )

    # ---- kinds of layers ------------------------------------------------------------------------

    def _kinds(self, c: Fields, has: Has) -> tuple[tuple[LayerSpec, ...], tuple[int, ...]]:
        """The kinds of layers, and the shortest pattern that repeats."""
        layers, types = c.integer("num_hidden_layers"), self._layer_types(c)
        rules = (self.sliding if types is None else lambda c, i: types[i] == SLIDING,
                 self.unrotated, self.routed)
        differ = [rule for rule in rules if rule is not None]
        if differ and layers > MOST_LAYERS:
            raise c.error("num_hidden_layers", f"at most {MOST_LAYERS}")
        off = (False, False, self.experts is not None)
        found = [tuple(bool(rule(c, i)) if rule else usual
                       for rule, usual in zip(rules, off, strict=True))
                 for i in range(layers if differ else 1)]
        kinds = list(dict.fromkeys(found))
        pattern = [kinds.index(kind) for kind in found]
        if self.experts and not any(routed for *_, routed in kinds):
            self._experts(c, "silu")  # its keys are known, though no layer asks for them
        period = next(p for p in range(1, len(pattern) + 1)
                      if all(k == pattern[i % p] for i, k in enumerate(pattern)))
        layers = (self._layer(c, has, found.index(kind), *kind) for kind in kinds)
        return tuple(layers), tuple(pattern[:period])

    def _layer_types(self, c: Fields) -> list[str] | None:
        """layer_types of config.json where layers may slide; None where the row's rule decides."""
        types, layers = c["layer_types"], c["num_hidden_layers"]
        if not types:
            return None
        allowed = (FULL, SLIDING) if self.sliding else (FULL,)
        if not isinstance(types, list) or any(kind not in allowed for kind in types):
            raise c.error("layer_types", f"a list of {' or '.join(allowed)}")
        if self.sliding and len(types) != layers:
            raise c.error("layer_types", f"{layers} entries, one for each layer", len(types))
        return types if self.sliding else None

    def _layer(
        self, c: Fields, has: Has, first: int, slides: bool, unrotated: bool, routed: bool
    ) -> LayerSpec:
        """A kind of layer, of which layer `first` is one."""
        attention = self._attention(c, slides, unrotated)
        act = c["hidden_act"]
        if not isinstance(act, str) or act not in self.activations:
            raise c.error("hidden_act", f"one of {', '.join(self.activations)}")
        act, hidden = self.activations[act], c.integer("hidden_size")
        experts = self._experts(c, act) if routed else None
        mlp = None if experts else MlpSpec(act, self._width(c))
        sizes = layer_sizes(hidden, attention, mlp, experts)
        linears = dict(self._linears(c, sizes, attention, experts))
        if experts:
            linears |= self._expert_linears(c, sizes, experts, has, first)
        norms = {place: self._norm(c, name) for place, name in value(c, self.norms).items()}
        return LayerSpec(
            hidden=hidden, attention=attention, mlp=mlp, norms=norms | self._inner(c, attention),
            linears=linears, parallel=switch(c, self.parallel),
            residual_scale=float(value(c, self.residual_scale, 1.0)), experts=experts,
            norm_sums=switch(c, self.norm_sums),
            dense=self._dense(hidden, attention, experts),
        )

    # ---- blocks ---------------------------------------------------------------------------------

    def _attention(self, c: Fields, slides: bool, unrotated: bool) -> AttentionSpec:
        heads, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
        if heads > MOST_HEADS:
            raise c.error("num_attention_heads", f"at most {MOST_HEADS}")
        kv_heads = count(c, self.kv_heads, heads)
        if kv_heads < 1 or heads % kv_heads:
            raise c.error("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
        ranks: dict[str, int] = {}
        if self.latent:
            kv_heads, rope = heads, c.integer("qk_rope_head_dim")
            head_dim = c.integer("qk_nope_head_dim") + rope
            if head_dim > LARGEST_HEAD:
                raise c.error("qk_rope_head_dim", f"at most {LARGEST_HEAD} with qk_nope_head_dim")
            ranks = {"value_dim": c.integer("v_head_dim"), "kv_rank": c.integer("kv_lora_rank"),
                     "q_rank": 0 if c.absent("q_lora_rank") else c.integer("q_lora_rank")}
        else:
            head_dim = rope = self._head_dim(c, hidden, heads)
        slopes = value(c, self.slopes)
        window = c.integer("sliding_window") if slides and c["sliding_window"] is not None else 0
        rotary = None if unrotated or slopes else self._rotary(c, rope, slides)
        return AttentionSpec(
            heads, kv_heads, head_dim, float(value(c, self.scale, 1 / math.sqrt(head_dim))), window,
            rotary, softcap=float(value(c, self.softcap, 0.0)), slopes=slopes or (),
            slopes_bfloat16=bool(slopes) and self.slopes_before_scale,
            qkv_clip=float(value(c, self.qkv_clip, 0.0)), **ranks,
            **dict(zip(("query_growth", "query_original"), value(c, self.query_growth, ()),
                       strict=False)),
        )

    def _head_dim(self, c: Fields, hidden: int, heads: int) -> int:
        if self.head_dim == "head_dim" and "head_dim" in c:
            head_dim = c.integer("head_dim")
        elif callable(self.head_dim):
            head_dim = self.head_dim(c)
        elif hidden % heads:
            raise c.error("num_attention_heads", f"a divisor of hidden_size = {hidden} (no "
                                                 f"head_dim)")
        else:
            head_dim = hidden // heads
        if head_dim > LARGEST_HEAD:
            raise c.error("head_dim", f"at most {LARGEST_HEAD}", head_dim)
        return head_dim

    def _rotary(self, c: Fields, head_dim: int, slides: bool) -> RotarySpec | None:
        r = self.rotary
        if r is None:
            return None
        if r.by_kind:  # those of the other kind may not be asked for
            c.ignore("rope_parameters", "rope_scaling", "rope_theta")
        kind = (SLIDING if slides else FULL) if r.by_kind else None
        rotary = rotary_spec(
            c, head_dim, kind=kind, interleaved=switch(c, r.interleaved),
            theta_key=r.local_theta or r.theta_key if slides else r.theta_key,
            partial_key=r.partial_key,
            dim=None if r.dim is None else count(c, r.dim, head_dim))
        if not all(map(math.isfinite, rotary.inv_freq)):
            raise c.error("rope_theta", "frequencies that are finite in float32")
        return rotary

    def _width(self, c: Fields) -> int:
        """Channels inside the MLP."""
        if callable(self.intermediate):
            return self.intermediate(c)
        return c.integer("intermediate_size")

    def _experts(self, c: Fields, activation: str) -> ExpertsSpec:
        e = self.experts
        total, chosen = c.integer(e.count), c.integer(e.chosen)
        if total > MOST_EXPERTS:
            raise c.error(e.count, f"at most {MOST_EXPERTS}")
        if chosen > total:
            raise c.error(e.chosen, f"at most {e.count} = {total}")
        groups, best = (count(c, rule, 1) for rule in (e.groups, e.chosen_groups))
        if total % groups or best > groups:
            raise c.error("n_group", f"a divisor of {e.count} = {total}, and topk_group within it")
        return ExpertsSpec(
            total, chosen, e.activation or activation, c.integer(e.intermediate),
            scoring=e.scoring(c), normalize=switch(c, e.normalize),
            scale=float(value(c, e.scale, 1.0)), groups=groups, chosen_groups=best,
            group_score=e.group_score, limit=float(value(c, e.limit, 0.0)),
            shared_intermediate=count(c, e.shared, 0),
        )

    def _norm(self, c: Fields, name: str, norm: Norm | None = None) -> NormSpec:
        n = norm or self.norm
        eps = c.number(n.eps) if isinstance(n.eps, str) else n.eps
        return NormSpec(name, n.kind, eps, n.offset, switch(c, n.bias),
                        weight=switch(c, n.weight))

    def _inner(self, c: Fields, a: AttentionSpec) -> dict[str, NormSpec]:
        """The norms inside attention, by place."""
        norms = {}
        if self.latent:
            for place, rank in (("q_a_norm", a.q_rank), ("kv_a_norm", a.kv_rank)):
                if rank:
                    name = f"model.layers.{{i}}.self_attn.{place.replace('norm', 'layernorm')}"
                    norms[place] = self._norm(c, name, Norm(eps=1e-6))
        row = value(c, self.head_norms)
        if row:
            for role, heads in (("q", a.heads), ("k", a.kv_heads)):
                shape = {"head": (a.head_dim,), "heads": (heads, a.head_dim),
                         "whole": (heads * a.head_dim,)}[row.shape]
                norm = self._norm(c, row.name.replace("{role}", role), row.norm)
                norms[f"{role}_norm"] = replace(norm, shape=shape)
        return norms

    def _dense(
        self, hidden: int, a: AttentionSpec, experts: ExpertsSpec | None
    ) -> dict[str, DenseSpec]:
        """The tensors of a layer that are never quantized, by what they are for the blocks."""
        rows: list[tuple[str, str | None, tuple[int, ...]]] = [("sinks", self.sinks, (a.heads,))]
        if experts:
            e, count = self.experts, experts.count
            rows += [("router", f"{e.router}.weight", (count, hidden)),
                     ("router_bias", e.router_bias, (count,)),
                     ("correction", e.correction, (count,)),
                     ("shared_router", e.shared_router, (1, hidden))]
        return {key: DenseSpec(name, shape) for key, name, shape in rows if name}

    # ---- linears --------------------------------------------------------------------------------

    def _biased(self, c: Fields) -> set[str]:
        """The roles that have a bias."""
        found = set(value(c, self.biases))
        for key, roles in self.bias_keys.items():
            if c.boolean(key):
                found |= {*(roles_of(roles) if isinstance(roles, str) else roles)}
        return found

    def _roles(self, a: AttentionSpec, experts: ExpertsSpec | None) -> list[str]:
        """The roles of a layer, those of its experts left out."""
        q = (("q_a", "q_b") if a.q_rank else ("q",)) if self.latent else ("q", "k", "v")
        roles = {*q, "o", *(("kv_a", "kv_b") if self.latent else ())}
        if experts is None:
            roles |= {"up", "down", *(("gate",) if self.gated else ())}
        elif experts.shared_intermediate:
            roles |= {*roles_of("shared")}
        return [role for role in ROLES if role in roles]

    def _linears(
        self, c: Fields, sizes: Mapping[str, int], a: AttentionSpec, experts: ExpertsSpec | None
    ) -> Iterator[tuple[str, LinearSpec]]:
        """(role, linear) of a layer, in the order of ROLES."""
        biased, shared = self._biased(c), self.experts.shared_fused if experts else ()
        fused = {role: s for s in (*self.fused, *shared) for role in s.roles}
        blocks = {"": 1, "kv_heads": a.kv_heads}
        for role in self._roles(a, experts):
            row = ROLES[role]
            n, k = sizes[row.outputs], sizes[row.inputs]
            if role in fused:
                parts = {r: sizes[ROLES[r].outputs] for r in fused[role].roles}
                yield role, _part(fused[role], role, parts, k, role in biased,
                                  blocks[fused[role].blocks])
            elif row.block == "shared":
                name = self.experts.shared_linears.replace("{role}", role.removeprefix("shared_"))
                yield role, LinearSpec(name, n, k)
            else:
                name = self.linears.get(role) or self.linears[row.block].replace("{role}", role)
                yield role, LinearSpec(name, n, k, role in biased)

    def _expert_linears(
        self, c: Fields, sizes: Mapping[str, int], experts: ExpertsSpec, has: Has, layer: int
    ) -> dict[str, LinearSpec]:
        """The linears of all experts by role, one expert after the other."""
        row, biased = self.experts, self._biased(c)
        stack = next((s for s in row.stacks if has(tensor_name(s[0].name, layer))), None)
        if stack is None and not row.each:
            stack = row.stacks[0]
        linears = {}
        for role in ("gate", "up", "down"):
            n, k = sizes[ROLES[role].outputs], sizes[ROLES[role].inputs]
            if stack is None:
                name = row.each.get(role) or row.each["mlp"].replace("{role}", role)
                linears[role] = LinearSpec(name, n, k, role in biased)
                continue
            stored = next(s for s in stack if role in s.roles)
            parts = {r: sizes[ROLES[r].outputs] for r in stored.roles}
            part = _part(stored, role, parts, k, role in biased,
                         n if stored.blocks else 1)
            name = f"{stored.name.removesuffix('.weight')}.{{e}}.{role}"
            linears[role] = replace(part, name=name, experts=experts.count)
        return {f"{role}.{e}": replace(linear, expert=e) for e in range(experts.count)
                for role, linear in linears.items()}


def _part(
    stored: Stored, role: str, parts: Mapping[str, int], k: int, bias: bool, blocks: int
) -> LinearSpec:
    """The linear of a role in a tensor that holds the rows of `parts`."""
    before = stored.roles[: stored.roles.index(role)]
    base = stored.name.removesuffix(".weight")
    return LinearSpec(
        f"{base}.{role}", parts[role], k, bias, stored.name, stored.bias or f"{base}.bias",
        first_row=sum(parts[other] for other in before) // blocks, blocks=blocks,
        transposed=stored.transposed, rows=sum(parts.values()),
    )
