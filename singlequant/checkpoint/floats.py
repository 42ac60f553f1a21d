# SPDX-License-Identifier: Apache-2.0
"""Weights stored in floats of 8 and 4 bits with scales: fp8 (e4m3) and MXFP4.

Both are how their makers publish them: DeepSeek, Qwen and Mistral in fp8, gpt-oss in MXFP4.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .. import _C
from .._C import FormatError
from ..tensors import DTYPES, TensorInfo
from .decoded import Decoded, Forms, Given

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")  # U8: the exponents of F8_E8M0
FP8_SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale")
FP8_ACTIVATIONS = ("activation_scale", "input_scale", "qscale_act", "input_scale_ub",
                   "output_scale")


def made_info(like: TensorInfo, shape: tuple[int, ...], dtype: str = "BF16") -> TensorInfo:
    """A decoded tensor's entry; `like` says where its values lie."""
    return TensorInfo(like.path, dtype, shape, like.begin, prod(shape) * DTYPES[dtype].itemsize)


# ---- fp8 ----------------------------------------------------------------------------------------


def find_fp8(given: Given) -> Forms:
    """Weights of e4m3 with a scale per block, per row or per tensor.

    weight_block_size of quantization_config is the size of blocks, where those at the edges may be
    smaller. FormatError for a weight without a scale that fits.
    """
    forms, infos, block = Forms(), given.infos, given.settings.get("weight_block_size")
    for name, info in infos.items():
        if info.dtype != "F8_E4M3":
            continue
        stem, dot, leaf = name.rpartition(".")
        scales = [f"{name}_scale_inv", f"{name}_scale"]
        beside = {f"{name}_activation_scale"}
        if leaf == "weight":
            scales = [f"{stem}{dot}{scale}" for scale in FP8_SCALES]
            beside = {f"{stem}{dot}{scale}" for scale in FP8_ACTIVATIONS}
        scale = next((s for s in scales if s in infos), None)
        if scale is None:
            raise FormatError(f"{info.path}: {name}: expected a scale beside the fp8 weight, such "
                              f"as {scales[0]}, found none")
        decode = partial(_decode_fp8, *_blocks_of(name, info, scale, infos[scale], block))
        forms.add(name, Decoded(made_info(info, info.shape), (name, scale), decode),
                  *(beside & set(infos)))
    return forms


def _blocks_of(
    name: str, info: TensorInfo, scale: str, found: TensorInfo, block: Any
) -> tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int]]:
    """(weight [count, n, k], scales [count, rows, columns], block) of an fp8 weight."""
    if len(info.shape) < 2 or found.dtype not in SCALE_DTYPES:
        raise FormatError(f"{info.path}: {name}: expected a matrix of fp8 and a scale in "
                          f"{', '.join(SCALE_DTYPES)}, found {list(info.shape)} and {found.dtype}")
    *lead, n, k = info.shape
    count, shape = prod(lead), found.shape
    if prod(shape) == 1:
        grid = (1, 1, 1)
    elif list(shape) == lead:
        grid = (count, 1, 1)
    elif len(shape) == len(info.shape) and list(shape[:-2]) == lead:
        grid = (count, *shape[-2:])
    elif shape == (n,):
        grid = (1, n, 1)
    else:
        grid = (0, 0, 0)
    sizes = tuple(block) if _is_block(block) else (0, 0)
    if min(sizes) and grid[1:] == (-(-n // sizes[0]), -(-k // sizes[1])):
        return (count, n, k), grid, sizes
    if not all(grid[1:]) or n % grid[1] or k % grid[2]:
        raise FormatError(f"{found.path}: {scale}: expected a scale per block of {name} "
                          f"{list(info.shape)}, found shape {list(shape)}"
                          + (f" with weight_block_size {block!r:.40}" if block else ""))
    return (count, n, k), grid, (max(n // grid[1], 1), max(k // grid[2], 1))


def _is_block(block: Any) -> bool:
    return (isinstance(block, list) and len(block) == 2
            and all(type(size) is int and 0 < size < 2**31 for size in block))


def _decode_fp8(
    shape: tuple[int, int, int], grid: tuple[int, int, int], block: tuple[int, int],
    codes: NDArray[Any], scales: NDArray[Any],
) -> NDArray[Any]:
    """The weight in bfloat16, in the shape of its codes."""
    if scales.dtype == np.uint8:
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    factors = scales.astype(np.float32).reshape(grid)
    factors = np.broadcast_to(factors, (shape[0], *grid[1:]))
    bits = _C.decode_fp8(codes.view(np.uint8).reshape(shape), factors, *block)
    return bits.view(BFLOAT16).reshape(codes.shape)


# ---- MXFP4 --------------------------------------------------------------------------------------


def find_mxfp4(given: Given) -> Forms:
    """Stacks of experts in MXFP4: `NAME_blocks` and `NAME_scales` stand for NAME.

    NAME is [experts, inputs, outputs], the transpose of what is stored, as in transformers.
    """
    forms, infos = Forms(), given.infos
    for blocks, info in infos.items():
        name = blocks.removesuffix("_blocks")
        scales = infos.get(f"{name}_scales")
        if name == blocks or scales is None:
            continue
        shape = info.shape
        if (info.dtype != "U8" or scales.dtype != "U8" or len(shape) != 4 or shape[3] != 16
                or scales.shape != shape[:3]):
            raise FormatError(
                f"{info.path}: {blocks}: expected U8 [experts, outputs, groups, 16] and U8 scales "
                f"[experts, outputs, groups], found {info.dtype} {list(shape)} and {scales.dtype} "
                f"{list(scales.shape)}")
        made = made_info(info, (shape[0], shape[2] * 32, shape[1]))
        forms.add(name, Decoded(made, (blocks, f"{name}_scales"), _decode_mxfp4))
    return forms


def _decode_mxfp4(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[Any]:
    return _C.decode_mxfp4(blocks, scales).view(BFLOAT16)
