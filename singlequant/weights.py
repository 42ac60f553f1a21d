# SPDX-License-Identifier: Apache-2.0
"""A layer's weights, as a checkpoint has them and as they are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import INT8_STEP, QuantConfig, check_clip
from .rotations import BlockRotation, SiteRotation


def packed_words(k: int) -> int:
    """int32 words of one packed row of k codes."""
    return -(-k // 8)


@dataclass(frozen=True, eq=False, repr=False)
class PackedLinear:
    """int4 weights in the stored layout: code + 8 in nibbles, low nibble first, tail code 0."""

    words: NDArray[np.int32]  # [n, ceil(k / 8)]
    scales: NDArray[np.float32]  # [n, k / group], [n, 1] for group 0
    shape: tuple[int, int]  # (n, k)
    group: int  # inputs per scale, 0 = all of them

    def __post_init__(self) -> None:
        n, k = self.shape
        if self.group and k % self.group:
            raise ValueError(f"group: expected a divisor of k = {k}, found {self.group}")
        groups = k // self.group if self.group else 1
        for name, dtype, shape in (
            ("words", np.int32, (n, packed_words(k))),
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
        return f"PackedLinear({n}x{k}, {f'group {self.group}' if self.group else 'per channel'})"


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


def norm_tensors(norm: Norm) -> dict[str, NDArray[Any]]:
    """A norm's tensors by name."""
    tensors = {f"{norm.name}.weight": norm.weight}
    return tensors if norm.bias is None else tensors | {f"{norm.name}.bias": norm.bias}


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


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedLayer:
    """One layer as it is written to the packed file."""

    index: int
    packed: Mapping[str, PackedLinear]  # by linear: "model.layers.0.self_attn.q_proj"
    dense: Mapping[str, NDArray[Any]]  # by tensor: norms, biases, weights of ignored linears
    rotations: Mapping[str, SiteRotation | BlockRotation]  # by site; absent = not rotated
    clips: Mapping[str, float] = field(default_factory=dict)  # by site; absent = the config's
    int8_inputs: Mapping[str, int] = field(default_factory=dict)  # by site; absent = 0

    def __post_init__(self) -> None:
        for value in self.clips.values():
            check_clip(value)

    def __repr__(self) -> str:
        sites = ", ".join(f"{s} {r.sizes[0]}x{r.sizes[1]}" for s, r in self.rotations.items())
        return (
            f"QuantizedLayer({self.index}, {len(self.packed)} packed, {len(self.dense)} dense, "
            f"rotations: {sites or 'none'})"
        )


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
