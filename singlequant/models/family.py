# SPDX-License-Identifier: Apache-2.0
"""A family of models as a row: what config.json means, and where the tensors lie.

A row holds no code of its own. `Family.spec` makes a ModelSpec of it and a config.json: sites and
producers follow from there (spec.py). docs/adding-a-family.md tells how a row is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config_json import HARMLESS, Fields
from .rope import parse_rope, rotary_spec
from .spec import (
    ROLES,
    AttentionSpec,
    LayerSpec,
    LinearSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    layer_sizes,
    roles_of,
)

LARGEST_HEAD = 65536  # channels; far beyond any model, and small enough to make its frequencies


@dataclass(frozen=True)
class Stored:
    """A tensor that holds the rows of several roles one after the other, such as a fused qkv."""

    name: str  # without .weight; `{i}` is the layer's index
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Norm:
    """How a family's norms compute. eps: the key of config.json. offset is added to the weight."""

    kind: str = "rms"
    eps: str = "rms_norm_eps"
    offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class Family:
    """One row. `{i}` in a template is the layer's index, `{role}` the linear's role."""

    name: str  # config.json's architectures[0]
    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    norm: Norm = Norm()
    norms: Mapping[str, str] = field(default_factory=dict)  # tensor by place; see NORM_PLACES
    linears: Mapping[str, str] = field(default_factory=dict)  # template by block, with `{role}`
    fused: tuple[Stored, ...] = ()  # tensors that stand in place of some of `linears`
    gated: bool = True
    activations: Mapping[str, str] = field(default_factory=dict)  # hidden_act -> activation
    biases: tuple[str, ...] = ()  # roles that always have a bias
    bias_keys: Mapping[str, str] = field(default_factory=dict)  # key -> block with biases if true
    window: bool = False  # whether sliding_window of config.json holds for all layers
    ignored_keys: tuple[str, ...] = ()  # of config.json: the family's code does not read them
    ignored_tensors: tuple[str, ...] = ("*.rotary_emb.inv_freq",)  # buffers of old checkpoints
    # What transformers' config class assumes where config.json is silent.
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def spec(self, config: Mapping[str, Any], source: str = "config.json") -> ModelSpec:
        """The model that config.json describes.

        FormatError names the key, what was expected and what was found. A key that is on and that
        neither this row nor HARMLESS knows is refused: it may change the result.
        """
        c = Fields({**self.defaults, **config}, source)
        hidden, kinds = c.integer("hidden_size"), c["layer_types"] or []
        if not isinstance(kinds, list) or any(kind != kinds[0] for kind in kinds):
            raise c.error("layer_types", "a list with one kind of attention for all layers")
        spec = ModelSpec(
            family=self.name, hidden=hidden, vocab=c.integer("vocab_size"),
            layers=c.integer("num_hidden_layers"),
            max_position_embeddings=c.integer("max_position_embeddings"),
            embed=self.embed, head=self.head, tied=c.boolean("tie_word_embeddings"),
            final_norm=self._norm(c, self.final_norm), kinds=(self._layer(c, hidden),),
        )
        c.require_no_others((*HARMLESS, *self.ignored_keys))
        return spec

    def _layer(self, c: Fields, hidden: int) -> LayerSpec:
        attention = self._attention(c, hidden)
        act = c["hidden_act"]
        if not isinstance(act, str) or act not in self.activations:
            raise c.error("hidden_act", repr(next(iter(self.activations))))
        mlp = MlpSpec(self.activations[act], c.integer("intermediate_size"))
        sizes, biased = layer_sizes(hidden, attention, mlp), self._biased(c)
        return LayerSpec(
            hidden=hidden, attention=attention, mlp=mlp,
            norms={place: self._norm(c, name) for place, name in self.norms.items()},
            linears=dict(self._linears(sizes, biased)),
        )

    def _attention(self, c: Fields, hidden: int) -> AttentionSpec:
        heads = c.integer("num_attention_heads")
        kv_heads = heads if c.absent("num_key_value_heads") else c.integer("num_key_value_heads")
        if heads % kv_heads:
            raise c.error("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
        if not c.absent("head_dim"):
            head_dim = c.integer("head_dim")
        elif hidden % heads:
            raise c.error("num_attention_heads", f"a divisor of hidden_size = {hidden} (no "
                                                 f"head_dim)")
        else:
            head_dim = hidden // heads
        if head_dim % 2 or head_dim > LARGEST_HEAD:
            raise c.error("head_dim", f"an even number up to {LARGEST_HEAD}", head_dim)
        window = c.integer("sliding_window") if self.window and "sliding_window" in c else 0
        rotary = rotary_spec(parse_rope(c), head_dim)
        if not all(map(math.isfinite, rotary.inv_freq)):
            raise c.error("rope_theta", "frequencies that are finite in float32")
        return AttentionSpec(heads, kv_heads, head_dim, 1 / math.sqrt(head_dim), window, rotary)

    def _norm(self, c: Fields, name: str) -> NormSpec:
        n = self.norm
        return NormSpec(name, n.kind, c.number(n.eps), n.offset, n.bias)

    def _biased(self, c: Fields) -> set[str]:
        """The roles that have a bias."""
        blocks = [block for key, block in self.bias_keys.items() if c.boolean(key)]
        return {*self.biases, *(role for block in blocks for role in roles_of(block))}

    def _linears(
        self, sizes: Mapping[str, int], biased: set[str]
    ) -> Iterator[tuple[str, LinearSpec]]:
        """(role, linear) of a layer, in the order of ROLES."""
        fused = {role: stored for stored in self.fused for role in stored.roles}
        for role, row in ROLES.items():
            if role == "gate" and not self.gated:
                continue
            n, k = sizes[row.outputs], sizes[row.inputs]
            if role not in fused:
                name = self.linears[row.block].replace("{role}", role)
                yield role, LinearSpec(name, n, k, role in biased)
                continue
            stored = fused[role]
            before = stored.roles[: stored.roles.index(role)]
            yield role, LinearSpec(f"{stored.name}.{role}", n, k, role in biased, stored.name,
                                   sum(sizes[ROLES[other].outputs] for other in before))
