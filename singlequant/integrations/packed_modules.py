# SPDX-License-Identifier: Apache-2.0
"""The linears and tables of a packed folder as modules of transformers' model of the same family.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import _C
from ..checkpoint.folder import Checkpoint
from ..export.packed import source_config
from ..models.families import find_family
from ..models.spec import LinearSpec, ModelSpec
from ..weights import PackedLinear, PackedTable
from .in_place import is_conv1d
from .linear import Linear
from .tables import TableEmbedding, TableHead

# Tensors of a packed folder that no module of another library has; we read them ourselves.
OURS = (r"\.weight_(packed|scale|shape|bits|codes)$", r"\.rotations\.", r"\.activations\.")


@dataclass(frozen=True)
class Rows:
    """A linear's rows among those of a module that has several linears."""

    first: int  # in each block
    count: int  # of a block
    blocks: int
    total: int  # rows of the module


@dataclass(frozen=True)
class Place:
    """Where a linear or a table of the folder lies in the model."""

    module: str
    rows: Rows | None = None  # None: it is all of the module
    scale: float = 1.0  # of an embedding


class Fused(torch.nn.Module):
    """Linears that transformers keeps in one module: their outputs, put together as rows are."""

    def __init__(self, parts: Sequence[tuple[Rows, torch.nn.Module]]) -> None:
        super().__init__()
        self.rows = [rows for rows, _ in parts]
        self.parts = torch.nn.ModuleList(part for _, part in parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., rows] of x [..., k]."""
        total, blocks = self.rows[0].total, self.rows[0].blocks
        y = x.new_empty((*x.shape[:-1], blocks, total // blocks))
        for rows, part in zip(self.rows, self.parts, strict=True):
            own = part(x).reshape(*x.shape[:-1], rows.blocks, rows.count)
            y[..., rows.first : rows.first + rows.count] = own
        return y.reshape(*x.shape[:-1], total)


def find_places(model: Any, checkpoint: Checkpoint) -> dict[str, Place]:
    """Where the packed linears and tables of a folder lie in transformers' model, by their names.

    ValueError where the model has no such module, as where transformers keeps experts in one
    tensor.
    """
    spec, source = checkpoint.spec, _source_spec(checkpoint)
    found: dict[str, Place] = {}
    for i in range(spec.layers):
        for role, linear in spec.layer(i).linears.items():
            name = checkpoint.linear_name(i, role)
            stored = source.layer(i).linears[role]
            if f"{name}.weight_packed" in checkpoint.tensors:
                found[name] = _linear_place(model, name, linear, stored, stored.weight_name(i))
    shape, head = (spec.vocab, spec.width), model.get_output_embeddings()
    if f"{spec.embed}.weight_codes" in checkpoint.tensors:
        embed = model.get_input_embeddings()
        # Other embeddings multiply by the scale that most families have outside of them.
        scale = 1.0 if type(embed) is torch.nn.Embedding else spec.embed_scale
        found[spec.embed] = Place(_checked(model, spec.embed, embed, torch.nn.Embedding, shape),
                                  scale=scale)
    table = spec.embed if spec.tied else spec.head
    if f"{table}.weight_codes" in checkpoint.tensors and head is not None:
        found[spec.head] = Place(_checked(model, spec.head, head, torch.nn.Linear, shape))
    return found


def _source_spec(checkpoint: Checkpoint) -> ModelSpec:
    """How the source stores the model: which linears share a tensor, and transformers a module."""
    config = source_config(checkpoint.config)
    return find_family(config).spec(config, str(checkpoint.path / "config.json"))


def _linear_place(
    model: Any, name: str, linear: LinearSpec, stored: LinearSpec, tensor: str
) -> Place:
    """The place of a linear. stored: as the source has it, in that tensor."""
    if not stored.rows and stored.expert is None:
        return Place(_place(model, name, torch.nn.Linear, (linear.n, linear.k)))
    if stored.experts or stored.expert is not None:
        raise ValueError(f"{name}: transformers keeps experts in tensors of its own; "
                         f"singlequant.load runs the folder")
    place = _place(model, tensor.removesuffix(".weight"), torch.nn.Linear,
                   (stored.rows, linear.k))
    return Place(place, Rows(stored.first_row, linear.n // stored.blocks, stored.blocks,
                             stored.rows))


def _place(model: Any, name: str, kind: type, shape: tuple[int, int]) -> str:
    """The name of a module in the model."""
    for place in _spellings(model, name):
        try:
            module = model.get_submodule(place)
        except AttributeError:
            continue
        return _checked(model, name, module, kind, shape)
    raise ValueError(f"{name}: expected a module of that name in {type(model).__name__}, found "
                     f"none; singlequant.load runs the folder")


def _checked(
    model: Any, name: str, module: torch.nn.Module, kind: type, shape: tuple[int, int]
) -> str:
    """The module's name in the model, if it can be what the folder calls `name`."""
    found: Any = type(module).__name__
    if isinstance(module, kind):
        found = tuple(module.weight.shape)
    elif is_conv1d(module):
        found = tuple(module.weight.shape)[::-1]
    if found != shape:
        raise ValueError(f"{name}: expected a {kind.__name__} {shape} in {type(model).__name__}, "
                         f"found {found}")
    return next(place for place, other in model.named_modules() if other is module)


def _spellings(model: Any, name: str) -> tuple[str, str, str]:
    """Names that it may have in the model: a base model's lack a prefix, or the folder's do."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name


def require_rest(model: Any, folder: Path, tensors: Container[str]) -> None:
    """ValueError for a parameter that is none of a folder's tensors, and so would stay random.

    model: with the modules taken out that the folder's packed linears will be.
    """
    tied = getattr(model, "all_tied_weights_keys", None)
    tied = tied if isinstance(tied, dict) else {}
    for name, _ in model.named_parameters():
        names = [name, *(other for pair in tied.items() if name in pair for other in pair)]
        if not any(found in tensors for n in names for found in _spellings(model, n)):
            raise ValueError(f"{folder}: {name}: {type(model).__name__} expects it, and "
                             f"the folder does not have it")


def make_modules(
    checkpoint: Checkpoint, places: Mapping[str, Place]
) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name in the model, module) of what the folder packs."""
    fused: dict[str, list[tuple[Rows, torch.nn.Module]]] = {}
    for i in range(checkpoint.spec.layers):
        for name, module in layer_modules(checkpoint, i):
            place = places[name]
            if place.rows is None:
                yield place.module, module
            else:
                fused.setdefault(place.module, []).append((place.rows, module))
    for name, parts in fused.items():
        if sum(rows.count for rows, _ in parts) * parts[0][0].blocks != parts[0][0].total:
            raise ValueError(f"{name}: expected all linears of it packed or none, found some; "
                             f"singlequant.load runs the folder")
        yield name, Fused(parts)
    spec, outer = checkpoint.spec, checkpoint.outer
    for name, table in ((spec.embed, checkpoint.embedding), (spec.head, checkpoint.head)):
        if name not in places or not isinstance(table, PackedTable):
            continue
        if name == spec.embed:
            yield places[name].module, TableEmbedding(table, places[name].scale)
        else:
            bias = outer.get(f"{name}.bias")
            bits = checkpoint.quant_config.head_input_bits
            yield places[name].module, TableHead(table, bits, None if bias is None
                                                 else _C.to_float32(bias))


def layer_modules(
    checkpoint: Checkpoint, i: int, biases: bool = True
) -> Iterator[tuple[str, Linear]]:
    """(name in the folder, module) of the packed linears of layer i, with their biases or not."""
    weights, bits = checkpoint.layer(i), checkpoint.quant_config.activation_bits
    for site in checkpoint.spec.layer(i).sites.values():
        for role in site.roles:
            linear = weights.linears[role]
            if isinstance(linear.weight, PackedLinear):
                bias = linear.bias if biases else None
                yield linear.name, Linear.of(
                    linear.weight, bias, weights.rotations.get(site.name), bits,
                    weights.clips.get(site.name, 1.0), weights.int8_inputs.get(site.name, 0))
                checkpoint.release_packed(linear.name)  # read again if a state is asked for
