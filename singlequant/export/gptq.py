# SPDX-License-Identifier: Apache-2.0
"""Writes folders in GPTQ's layout: words and scales of a packed folder, transposed.

A word of qweight [k * bits / 32, n] has codes of successive inputs, low bits first, as ours have.
Zeros are 2^(bits - 1) and are stored one too small, as checkpoint_format "gptq" has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..weights import PackedLinear
from .codes import (
    Plain,
    require_linears,
    require_own_inputs,
    require_scheme,
    require_shapes,
    unpacked_modules,
    write_linears,
)
from .hf import narrowed, plain_config, stored_spec

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint

TO = "gptq"
BITS = (4, 8)
SCALES = np.dtype(np.float16)  # what its kernels read


def write(
    checkpoint: Checkpoint, out: Path, dtype: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a packed checkpoint of W4A16; what is not packed has dtype.

    ValueError for rotated inputs, linears that are not packed, and bits that differ.
    """
    require_own_inputs(checkpoint, TO)
    require_scheme(checkpoint, TO, "w4a16")
    plain = Plain(checkpoint)
    spec, group = stored_spec(plain), checkpoint.quant_config.group_size
    require_linears(spec, TO, checkpoint.path)

    def config(bits: Mapping[str, int]) -> dict[str, Any]:
        left = unpacked_modules(spec, bits)[1:]
        if left or len({*bits.values()}) != 1:
            found = f"{left[0]} that is not packed" if left else (
                f"{', '.join(map(str, sorted({*bits.values()})))} bits")
            raise ValueError(f"{checkpoint.path}: {TO}: expected packed linears of one number of "
                             f"bits, found {found}: quantize with --bits 4 and without --ignore")
        settings = {"quant_method": "gptq", "bits": next(iter(bits.values())),
                    "group_size": group or -1, "sym": True, "desc_act": False,
                    "lm_head": False, "true_sequential": True, "checkpoint_format": "gptq"}
        return {**plain_config(plain, dtype), "quantization_config": settings}

    write_linears(plain, spec, out, dtype, encode, config, progress=progress)


def encode(name: str, linear: PackedLinear) -> dict[str, NDArray[Any]]:
    """The tensors of a linear."""
    require_shapes(name, linear, TO, BITS)
    (n, k), bits = linear.shape, linear.bits
    scales = narrowed(np.ascontiguousarray(linear.scales.T), SCALES, f"{name}.scales")
    zero = sum((1 << bits - 1) - 1 << shift for shift in range(0, 32, bits))
    return {"qweight": np.ascontiguousarray(linear.words.T),
            "qzeros": np.full((len(scales), n * bits // 32), zero, np.uint32).view(np.int32),
            "scales": scales,
            "g_idx": (np.arange(k) // (linear.group or k)).astype(np.int32)}
