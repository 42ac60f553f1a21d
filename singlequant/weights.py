# SPDX-License-Identifier: Apache-2.0
"""A layer's weights, as a checkpoint has them and as they are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from . import _C
from .config import INT8_STEP, QuantConfig, check_clip
from .html import table_html
from .rotations import BlockRotation, SiteRotation

WEIGHT_BITS = (4, 5, 6, 8)


def packed_words(k: int, bits: int = 4) -> int:
    """int32 words of one packed row of k codes."""
    return -(-k * bits // 32)


@dataclass(frozen=True, eq=False, repr=False)
class PackedLinear:
    """Weights of 4, 5, 6 or 8 bits in the stored layout: code + 2^(bits-1), lowest bits first."""

    words: NDArray[np.int32]  # [n, ceil(k bits / 32)]
    scales: NDArray[np.float32]  # [n, k / group], [n, 1] for group 0
    shape: tuple[int, int]  # (n, k)
    group: int  # inputs per scale, 0 = all of them
    bits: int = 4

    def __post_init__(self) -> None:
        n, k = self.shape
        if self.bits not in WEIGHT_BITS:
            raise ValueError(f"bits: expected one of {', '.join(map(str, WEIGHT_BITS))}, found "
                             f"{self.bits}")
        if self.group and k % self.group:
            raise ValueError(f"group: expected a divisor of k = {k}, found {self.group}")
        groups = k // self.group if self.group else 1
        for name, dtype, shape in (
            ("words", np.int32, (n, packed_words(k, self.bits))),
            ("scales", np.float32, (n, groups)),
        ):
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(
                    f"{name}: expected {np.dtype(dtype)} {shape}, found {array.dtype} {array.shape}"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of words and scales."""
        return self.words.nbytes + self.scales.nbytes

    def __repr__(self) -> str:
        n, k = self.shape
        grid = f"group {self.group}" if self.group else "per channel"
        return f"PackedLinear({n}x{k}, {self.bits} bits, {grid})"


TABLE_DTYPES = {8: np.dtype(np.int8), 6: np.dtype(np.uint8), 4: np.dtype(np.uint8)}  # of codes
ROW_BLOCK = 32  # inputs of a row of codes that share a scale


def table_shapes(rows: int, width: int, bits: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of a table's codes and scales: a code a byte, or blocks of 4 * bits bytes."""
    blocks = -(-width // ROW_BLOCK)
    return (rows, width if bits == 8 else ROW_BLOCK * bits // 8 * blocks), (rows, blocks)


@dataclass(frozen=True, eq=False, repr=False)
class PackedTable:
    """An embedding or a head in 8, 6 or 4 bits, row by row, as docs/format.md stores it."""

    codes: NDArray[Any]  # int8 [rows, width], or uint8 [rows, 4 * bits * blocks]
    scales: NDArray[Any]  # bfloat16 [rows, blocks]
    shape: tuple[int, int]  # (rows, width)

    def __post_init__(self) -> None:
        shapes = table_shapes(*self.shape, self.bits)
        for name, dtype, shape in (("codes", TABLE_DTYPES[self.bits], shapes[0]),
                                   ("scales", np.dtype(ml_dtypes.bfloat16), shapes[1])):
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"{name}: expected {dtype} {shape}, found {array.dtype} "
                                 f"{array.shape}")

    @classmethod
    def of(cls, table: NDArray[Any], bits: int, name: str) -> PackedTable:
        """A table [rows, width] of 32- or 16-bit floats, rounded. ValueError names it when it
        holds NaN or Inf."""
        try:
            codes, scales = _C.quantize_rows(table, bits)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return cls(codes.view(TABLE_DTYPES[bits]), scales.view(ml_dtypes.bfloat16), table.shape)

    @property
    def bits(self) -> int:
        """8, 6 or 4."""
        if self.codes.dtype == np.int8:
            return 8
        return 6 if self.codes.shape == table_shapes(*self.shape, 6)[0] else 4

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def in_memory(self) -> PackedTable:
        """The same table in memory of its own. NumPy puts large arrays into huge pages."""
        return PackedTable(self.codes.copy(), self.scales.copy(), self.shape)

    def gather(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows index [m] as float32 [m, width]. ValueError outside of the table."""
        return _C.gather_codes(*self._bytes, self.bits, self.shape[1], index)

    def linear(self, x: NDArray[np.float32], activation_bits: int = 16) -> NDArray[np.float32]:
        """x [..., width] times the table transposed: [..., rows]. x is rounded to 8, 16 or 24 bits,
        with a scale for every 32 inputs. A row of x does not depend on the others, bit for bit."""
        return _C.linear_rows(x, *self._bytes, self.bits, activation_bits)

    @property
    def _bytes(self) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        """Codes and scales as the core reads them in place; of another type they are copied."""
        return self.codes.view(np.uint8), self.scales.view(np.uint16)

    def __repr__(self) -> str:
        return f"PackedTable({self.shape[0]}x{self.shape[1]}, {self.bits} bits)"


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear of a layer, y = x weight^T + bias."""

    name: str  # "model.layers.0.self_attn.q_proj"
    weight: NDArray[Any] | PackedLinear  # [n, k] in 32 or 16 bits, or packed
    bias: NDArray[Any] | None  # [n]

    def __repr__(self) -> str:
        n, k = self.weight.shape
        kind = "packed" if isinstance(self.weight, PackedLinear) else self.weight.dtype
        return f"Linear({self.name}, {n}x{k}, {kind}{', bias' if self.bias is not None else ''})"


@dataclass(frozen=True, eq=False)
class Norm:
    """One norm's weights, [hidden] each."""

    name: str  # "model.layers.0.input_layernorm"
    weight: NDArray[Any]
    bias: NDArray[Any] | None


@dataclass(frozen=True, eq=False)
class Dense:
    """A tensor of a layer that is never quantized, such as a router."""

    name: str  # whole
    array: NDArray[Any]


def norm_tensors(norm: Norm, weight: bool = True) -> dict[str, NDArray[Any]]:
    """A norm's tensors by name. weight: whether its weight is stored: it may be 1 everywhere."""
    parts = {"weight": norm.weight} if weight else {}
    parts |= {} if norm.bias is None else {"bias": norm.bias}
    if "{h}" not in norm.name:
        return {f"{norm.name}.{part}": array for part, array in parts.items()}
    return {f"{norm.name.replace('{h}', str(h))}.{part}": row
            for part, array in parts.items() for h, row in enumerate(array)}


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One decoder layer of a checkpoint. Arrays are read-only views of the files.

    By site: rotations holds the rotation as _C.rotate takes it, clips the share of a token's
    largest activation that the codes reach, int8_inputs how many leading inputs keep 8 bits. All
    three are empty for an unquantized checkpoint.
    """

    index: int
    norms: Mapping[str, Norm]  # by place
    linears: Mapping[str, Linear]  # by role
    rotations: Mapping[str, Any] = field(default_factory=dict)
    clips: Mapping[str, float] = field(default_factory=dict)
    int8_inputs: Mapping[str, int] = field(default_factory=dict)
    dense: Mapping[str, Dense] = field(default_factory=dict)  # by what it is: spec.LayerSpec.dense


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedLayer:
    """One layer as it is written to the packed file."""

    index: int
    packed: Mapping[str, PackedLinear]  # by linear: "model.layers.0.self_attn.q_proj"
    dense: Mapping[str, NDArray[Any]]  # by tensor: norms, biases, weights of ignored linears
    rotations: Mapping[str, SiteRotation | BlockRotation]  # by site; absent = not rotated
    clips: Mapping[str, float] = field(default_factory=dict)  # by site; absent = the config's
    int8_inputs: Mapping[str, int] = field(default_factory=dict)  # by site; absent = 0
    kv_largest: float = 0.0  # about the largest magnitude of its keys and values
    kv_least: float = 0.0  # of its keys or of its values, of those that are less; 0 = unknown

    def __post_init__(self) -> None:
        for value in self.clips.values():
            check_clip(value)

    def __repr__(self) -> str:
        sites = ", ".join(f"{s} {r.sizes[0]}x{r.sizes[1]}" for s, r in self.rotations.items())
        return (
            f"QuantizedLayer({self.index}, {len(self.packed)} packed, {len(self.dense)} dense, "
            f"rotations: {sites or 'none'})"
        )

    def _repr_html_(self) -> str:
        shapes = [f"{n} x {k}" for n, k in (linear.shape for linear in self.packed.values())]
        columns = [["linear", *self.packed], ["shape", *shapes],
                   ["bits", *(linear.bits for linear in self.packed.values())],
                   ["inputs a scale", *(linear.group or linear.shape[1]
                                        for linear in self.packed.values())]]
        notes = [f"{site}: {rotation!r}" for site, rotation in self.rotations.items()]
        return table_html(f"Layer {self.index}", columns, notes=notes)


def int8_problem(count: int, k: int, config: QuantConfig) -> str | None:
    """What a number of inputs with 8 bits among k is expected to be, if it is not; or None."""
    if count and config.activation_bits != 4:
        return f"expected 0 with {config.scheme}"
    step = config.group_size or INT8_STEP
    if not 0 <= count < k or count % step:
        return f"expected a multiple of {step} below {k}"
    return None


def packing_problem(linear: str, k: int, config: QuantConfig) -> str | None:
    """Why a linear with k inputs cannot be packed as config says, or None."""
    if config.group_size and k % config.group_size:
        return (
            f"group_size: expected a divisor of {linear}'s {k} inputs, found {config.group_size} "
            f"(choose another, 0, or list the linear under ignore)"
        )
    return None
