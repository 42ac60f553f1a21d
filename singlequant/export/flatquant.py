# SPDX-License-Identifier: Apache-2.0
"""Writes folders that vLLM-Ascend reads as W4A4_FLATQUANT_DYNAMIC.

Its kernel makes left_trans^T X right_trans of each token's inputs X [k1, k2] and quantizes that to
4 bits with the scale clip_ratio * max / 7 (vllm_ascend/quantization/methods/w4a4_flatquant.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..models.spec import ModelSpec
from ..rows import factor_matrix
from ..weights import PackedLinear
from .codes import (
    Plain,
    require_linears,
    require_packed,
    require_scheme,
    require_shapes,
    write_linears,
)
from .hf import NUMPY_DTYPES, narrowed, plain_config, stored_spec
from .packed import GUARD_KEY

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint

TO = "flatquant"
KIND, FLOAT = "W4A4_FLATQUANT_DYNAMIC", "FLOAT"  # of tensors in its description
DESCRIPTION = "quant_model_description.json"
GUARD = "none; vLLM-Ascend reads this folder, transformers does not"
PARTS = ("weight", "weight_scale", "weight_offset", "left_trans", "right_trans", "clip_ratio")


def write(
    checkpoint: Checkpoint, out: Path, dtype: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a packed checkpoint of W4A4; factors and what is not packed have dtype.

    ValueError for inputs with 8 bits, for groups, and for rotations that are no two factors of its
    sizes.
    """
    require_packed(checkpoint, TO)
    require_scheme(checkpoint, TO, "w4a4")
    group = checkpoint.quant_config.group_size
    if group:
        raise ValueError(f"{checkpoint.path}: {TO}: expected a scale for each output channel, "
                         f"found groups of {group}: quantize with --group-size 0")
    plain = Plain(checkpoint)
    spec = stored_spec(plain)
    require_linears(spec, TO, checkpoint.path)
    sites = _Sites(checkpoint, spec, dtype)

    def encode(name: str, linear: PackedLinear) -> dict[str, NDArray[Any]]:
        require_shapes(name, linear, TO, (4,))
        codes = _C.unpack(linear.words, linear.shape[1])
        values = (codes, linear.scales, np.zeros_like(linear.scales), *sites.of(name))
        return dict(zip(PARTS, values, strict=True))

    def config(bits: Mapping[str, int]) -> dict[str, Any]:
        return {**plain_config(plain, dtype), GUARD_KEY: GUARD}

    write_linears(plain, spec, out, dtype, encode, config, progress=progress,
                  files={DESCRIPTION: _description(spec, sites.packed)})


def _description(spec: ModelSpec, packed: set[str]) -> dict[str, str]:
    """What every tensor is, by name."""
    found = {"model_quant_type": KIND}
    for name, _ in spec.tensors():
        stem = name.removesuffix(".weight")
        found |= {f"{stem}.{part}": KIND for part in PARTS} if stem in packed else {name: FLOAT}
    return found | {f"{spec.head}.weight": FLOAT}


def factor_sizes(k: int) -> tuple[int, int] | None:
    """k1 <= k2 as vLLM-Ascend splits k inputs: the nearest to a square among those whose difference
    is even. None for k = 2 mod 4 and the like, which have none."""
    for k1 in range(isqrt(k), 0, -1):
        if k % k1 == 0 and (k // k1 - k1) % 2 == 0:
            return k1, k // k1
    return None


@dataclass
class _Sites:
    """What the linears of a packed checkpoint read, by the names under which they are stored."""

    checkpoint: Checkpoint
    spec: ModelSpec
    dtype: str

    def __post_init__(self) -> None:
        self._sites: dict[str, tuple[int, str]] = {}
        self.packed: set[str] = set()
        self._layer: Any = None
        for i in range(self.spec.layers):
            layer = self.spec.layer(i)
            for site in layer.sites.values():
                for role in site.roles:
                    name = layer.linears[role].weight_name(i).removesuffix(".weight")
                    self._sites[name] = i, site.name
                    own = self.checkpoint.linear_name(i, role)
                    if f"{own}.weight_packed" in self.checkpoint.tensors:
                        self.packed.add(name)

    def of(self, name: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]:
        """(left_trans, right_trans, clip_ratio) of a linear."""
        i, site = self._sites[name]
        if self._layer is None or self._layer.index != i:
            self._layer = self.checkpoint.layer(i)
        layer, where = self._layer, f"{self.checkpoint.path}: {TO}: layer {i}: {site}"
        if layer.int8_inputs.get(site):
            raise ValueError(f"{where}: expected inputs of 4 bits, found {layer.int8_inputs[site]} "
                             "with 8: quantize with a method that keeps none, such as singlequant")
        factors = self._factors(where, layer.rotations.get(site), self.spec.layer(i).sites[site].k)
        kind = NUMPY_DTYPES[self.dtype]
        left, right = (narrowed(np.ascontiguousarray(each.T), kind, f"{where}: factor")
                       for each in factors)
        clip = layer.clips.get(site, self.checkpoint.quant_config.activation_clip)
        return left, right, np.array([clip], np.float32)

    def _factors(
        self, where: str, rotation: Any, k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """L [k1, k1] and R [k2, k2] of L X R^T; the identity where nothing is rotated."""
        sizes = factor_sizes(k)
        if sizes is None:
            raise ValueError(f"{where}: expected inputs that vLLM-Ascend splits in two, found {k}")
        if rotation is None:
            return tuple(np.eye(size, dtype=np.float32) for size in sizes)
        if rotation.kind != "kronecker":
            what = "an alignment" if rotation.kind == "aligned" else "a rotation in blocks"
            raise ValueError(f"{where}: expected a left and a right factor, found {what}: quantize "
                             "with a method of two factors, such as singlequant")
        if tuple(rotation.sizes) != sizes:
            raise ValueError(f"{where}: expected factors of {sizes[0]} and {sizes[1]}, as "
                             f"vLLM-Ascend splits {k} inputs, found {rotation.sizes[0]} and "
                             f"{rotation.sizes[1]}")
        matrices = (factor_matrix(part) for part in rotation.parts)
        return tuple(np.eye(size, dtype=np.float32) if matrix is None else matrix
                     for size, matrix in zip(sizes, matrices, strict=True))
