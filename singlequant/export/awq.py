# SPDX-License-Identifier: Apache-2.0
"""Writes folders in AutoAWQ's gemm layout: codes transposed, eight outputs to a word.

The nibbles of a word, low one first, have the outputs 0, 2, 4, 6, 1, 3, 5, 7. Zeros are 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
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

TO = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output of each nibble of a word
ZEROS = 0x88888888
SCALES = np.dtype(np.float16)  # what its kernels read


def write(
    checkpoint: Checkpoint, out: Path, dtype: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a packed checkpoint of W4A16; what is not packed has dtype.

    ValueError for rotated inputs and for bits other than 4.
    """
    require_own_inputs(checkpoint, TO)
    require_scheme(checkpoint, TO, "w4a16")
    plain = Plain(checkpoint)
    spec, group = stored_spec(plain), checkpoint.quant_config.group_size
    require_linears(spec, TO, checkpoint.path)

    def config(bits: Mapping[str, int]) -> dict[str, Any]:
        settings = {"quant_method": "awq", "bits": 4, "group_size": group or -1,
                    "zero_point": True, "version": "gemm",
                    "modules_to_not_convert": unpacked_modules(spec, bits)}
        return {**plain_config(plain, dtype), "quantization_config": settings}

    write_linears(plain, spec, out, dtype, encode, config, progress=progress)


def encode(name: str, linear: PackedLinear) -> dict[str, NDArray[Any]]:
    """The tensors of a linear."""
    require_shapes(name, linear, TO, (4,))
    n, k = linear.shape
    codes = _C.unpack(linear.words, k).T.reshape(k, n // 8, 8)[:, :, ORDER]
    scales = narrowed(np.ascontiguousarray(linear.scales.T), SCALES, f"{name}.scales")
    zeros = np.full((len(scales), n // 8), ZEROS, np.uint32).view(np.int32)
    return {"qweight": _C.pack(codes.reshape(k, n)), "qzeros": zeros, "scales": scales}
