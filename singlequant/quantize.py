"""Checkpoint + rotations -> quantized layers: rotate the weights, round them, pack the codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from . import _C
from .artifacts import (
    LayerRotations,
    PackedLinear,
    QuantConfig,
    QuantizedLayer,
    SiteRotation,
    packed_words,
    packing_problem,
)
from .forward import float32_blocks, require_finite


def quantize_linear(
    weight: NDArray, rotation: SiteRotation | None, config: QuantConfig, name: str = "weight"
) -> PackedLinear:
    """Rotate and quantize weight [n, k] (float32, float16 or bfloat16), row block by row block.

    ValueError names the linear when it holds NaN or Inf, or when k does not suit the group size.
    """
    n, k = weight.shape
    group = config.group_size
    problem = packing_problem(name, k, config)
    if problem:
        raise ValueError(problem)
    words = np.empty((n, packed_words(k)), np.int32)
    scales = np.empty((n, k // group if group else 1), np.float32)
    rotated = rotation is not None and not rotation.is_identity
    if rotated:
        left, right = rotation.left.runtime(), rotation.right.runtime()
    for rows, block in float32_blocks(weight, name):
        if rotated:
            block = _C.rotate(block, left, right)
        codes, scales[rows], _ = _C.quantize(block, 4, group, True, 1.0, config.weights == "mse")
        words[rows] = _C.pack(codes)
    return PackedLinear(words, scales, (n, k), group)


def quantize_layer(checkpoint, rotations: LayerRotations, config: QuantConfig) -> QuantizedLayer:
    """One layer: every linear that config.ignore does not name, packed; the rest as it is.

    ValueError names the tensor that holds NaN or Inf.
    """
    architecture, index = checkpoint.architecture, rotations.layer
    weights = checkpoint.layer(index)
    dense = {
        f"{name.format(i=index)}.weight": norm
        for name, norm in zip(architecture.norms, weights.norms, strict=True)
    }
    packed, used = {}, {}
    for site, roles in architecture.sites.items():
        for linear in (weights.linears[role] for role in roles):
            if linear.bias is not None:
                dense[f"{linear.name}.bias"] = linear.bias
            if config.ignores(linear.name):
                dense[f"{linear.name}.weight"] = linear.weight
                continue
            rotation = rotations.sites.get(site)
            packed[linear.name] = quantize_linear(linear.weight, rotation, config, linear.name)
            if rotation is not None:
                used[site] = rotation
    for name, array in dense.items():
        require_finite(array, name)
    return QuantizedLayer(index, packed, dense, used)


def quantize(
    checkpoint, rotations: Iterable[LayerRotations], config: QuantConfig | None = None
) -> Iterator[QuantizedLayer]:
    """Quantize layer by layer; takes what `solve_rotations` yields and feeds `save`.

    For arrays use `singlequant.arrays.quantize`.
    """
    if isinstance(checkpoint, np.ndarray):
        raise TypeError(
            "checkpoint: expected a Checkpoint, got an array; arrays are quantized by "
            "singlequant.arrays.quantize"
        )
    config = config or QuantConfig()
    for layer in rotations:
        yield quantize_layer(checkpoint, layer, config)
