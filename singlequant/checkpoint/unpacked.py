# SPDX-License-Identifier: Apache-2.0
"""A packed folder seen as an unquantized one: weights dequantized and turned back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..export.packed import source_config
from ..models.spec import ModelSpec
from ..rows import ROWS_PER_BLOCK, TurnBack
from ..tensors import TensorInfo
from ..weights import LayerWeights, Linear, PackedLinear, PackedTable
from .views import View

__all__ = ["UnpackedCheckpoint"]


@dataclass(frozen=True, eq=False, repr=False)
class UnpackedCheckpoint(View):
    """A packed Checkpoint whose linears are float32 and read what came before their rotation.

    It takes a Checkpoint's place as the other views do. It computes what the packed folder does
    with activations of 16 bits. Rotations and alignments of sites are undone. What a method folded
    into the weights of others stays, as the folder does not tell it apart: balances, rotations of
    value heads and of the residual stream. A linear is made when it is read and is not kept.
    ValueError when the checkpoint is not packed.
    """

    source: Any  # the Checkpoint

    def __post_init__(self) -> None:
        if not self.source.quantized:
            raise ValueError(f"checkpoint: expected a packed one, found {self.source!r}")

    dtype = "float32"

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the model that was quantized."""
        return source_config(self.source.config)

    @cached_property
    def spec(self) -> ModelSpec:
        """The source's spec, every linear by itself."""
        return self.source.spec.separate()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Type and size of the tensors by name; all are float32."""
        return self._infos({name: "F32" for name, _ in self.spec.tensors()})

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the source's fingerprint and what is done to it."""
        return hashlib.sha256(self.source.fingerprint.encode() + b"unpacked").hexdigest()

    @property
    def embedding(self) -> NDArray[Any]:
        """[vocab, hidden], in float32 where the folder has codes."""
        return _values(self.source.embedding)

    @property
    def head(self) -> NDArray[Any]:
        """[vocab, hidden], in float32 where the folder has codes."""
        return _values(self.source.head)

    def require_finite(self, i: int) -> None:
        """Does nothing: codes and scales were checked when they were read."""

    def _layer(self, i: int) -> LayerWeights:
        layer = self.source.layer(i)
        return replace(layer, linears=_Linears(self.source, layer), rotations={}, clips={},
                       int8_inputs={})

    def __repr__(self) -> str:
        return f"UnpackedCheckpoint({self.source!r})"


class _Linears(Mapping[str, Linear]):
    """The linears of a packed layer by role, each made when it is looked up."""

    def __init__(self, source: Any, layer: LayerWeights) -> None:
        self._source, self._packed = source, layer.linears
        sites = source.spec.layer(layer.index).sites.values()
        self._turns = {role: layer.rotations.get(site.name) for site in sites
                       for role in site.roles}

    def __getitem__(self, role: str) -> Linear:
        linear = self._packed[role]
        if not isinstance(linear.weight, PackedLinear):  # a dense one reads the site's own inputs
            return linear
        rotation = self._turns[role]
        weight = _rows(linear.weight, None if rotation is None else TurnBack(rotation))
        self._source.release_packed(linear.name)
        return replace(linear, weight=weight)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


def _rows(packed: PackedLinear, back: TurnBack | None) -> NDArray[np.float32]:
    """The weight [n, k] that multiplies the site's own inputs, made a block of rows at a time."""
    out = np.empty(packed.shape, np.float32)
    for first in range(0, len(out), ROWS_PER_BLOCK):
        rows = slice(first, first + ROWS_PER_BLOCK)
        codes = _C.unpack(packed.words[rows], packed.shape[1], packed.bits)
        block = _C.dequantize(codes, packed.scales[rows])
        out[rows] = block if back is None else back(block)
    return out


def _values(table: NDArray[Any] | PackedTable) -> NDArray[Any]:
    """A table as it is, or what its codes stand for."""
    if isinstance(table, PackedTable):
        return table.gather(np.arange(table.shape[0]))
    return table
