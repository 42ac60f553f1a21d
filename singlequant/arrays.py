"""The array functions by themselves: rotations, quantizers, packing and linears on NumPy arrays.

Letters: m tokens (or rows), n outputs, k = k1 * k2 inputs, g group length along k. No model needed:

>>> import numpy as np
>>> from singlequant import arrays
>>> x = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
>>> k1, k2 = arrays.factor_sizes(512)
>>> y = arrays.rotate(x, arrays.hadamard(k1), arrays.hadamard(k2))
>>> codes, scales, zeros = arrays.quantize(y, bits=4)
>>> words = arrays.pack(codes)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _C
from ._C import PackedWeight, factor_sizes, givens_angle, unpack

__all__ = [
    "PackedWeight",
    "apply_chain",
    "art",
    "dequantize",
    "factor_sizes",
    "givens_angle",
    "hadamard",
    "linear",
    "pack",
    "quantize",
    "rotate",
    "uniformity_sweep",
    "unpack",
    "urt",
]

Chain = tuple[NDArray[np.int32], NDArray[np.float64]]


def hadamard(n: int) -> NDArray[np.float64]:
    """Orthonormal [n, n] matrix with near-flat entries, for every n >= 1.

    Sylvester, Paley or Hartley, and Kronecker products of them. ValueError for n < 1.
    """
    return _C.hadamard_matrix(n)


def art(x: ArrayLike, max_steps: int | None = None) -> Chain:
    """Alignment rotation for massive outliers, with each angle taken at the outlier's own token.

    x: [rows, n], a sample of activations along one axis. Repeats: pair the channel of largest
    absolute value with the one whose largest absolute value is smallest, rotate their values in the
    row of the peak to equal magnitude (`givens_angle`); stops when the peak no longer falls,
    or after max_steps (default 2 n). Returns the chain: pairs [steps, 2] and angles [steps] (rad).
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2:
        raise ValueError(f"x: expected 2 dimensions (rows, n), got {x.ndim}")
    return _C.art_columns(x.T, 2 * x.shape[1] if max_steps is None else max_steps)


def urt(v: ArrayLike, u: ArrayLike | None = None) -> Chain:
    """Uniformity rotation: the Givens chain of U = G_u^T G_v, which maps the vector v onto u.

    v: [n] statistics of one axis. u: [n] target, rescaled to the norm of v; default flat, with the
    signs of v. At most 2 (n - 1) rotations. Returns pairs [steps, 2] and angles [steps] in radians.
    """
    v = np.asarray(v, np.float64)
    return _C.urt(v, np.where(v < 0, -1.0, 1.0) if u is None else u)


def uniformity_sweep(x: ArrayLike, sweeps: int = 1) -> Chain:
    """Rotate every pair of channels once per sweep so that the sum of fourth powers is least.

    x: [rows, n], a sample of activations along one axis. The angle of a pair (a, b) is closed-form,
    theta = (pi - arg sum (a + i b)^4) / 4; with one row it is `givens_angle`. Returns the chain.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2:
        raise ValueError(f"x: expected 2 dimensions (rows, n), got {x.ndim}")
    pairs, angles, _ = _C.uniformity_sweep(x.T, sweeps)
    return pairs, angles


def apply_chain(chain: Chain, x: ArrayLike) -> NDArray[np.float64]:
    """Apply a chain of Givens rotations along the last axis of x [..., n]; returns float64."""
    return _C.chain_apply(chain[0], chain[1], x)


def rotate(x: ArrayLike, left: ArrayLike, right: ArrayLike) -> NDArray[np.float32]:
    """Row by row L X R^T, for x [..., k1 * k2] with X the row as (k1, k2); left L, right R.

    Both factors are orthogonal: rotating activations and weight rows alike leaves x W^T unchanged.
    Returns float32, shaped as x. ValueError names the factor that is not orthogonal, or does not
    fit.
    """
    return _C.rotate(x, _C.Rotation(np.shape(x)[-1] if np.ndim(x) else 1, left, right))


def quantize(
    x: ArrayLike,
    bits: int = 4,
    group: int = 0,
    symmetric: bool = True,
    clip: float = 1.0,
    search: bool = False,
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32] | None]:
    """Quantize x [m, k] per row (group = 0) or per group of columns to 4 or 8 bits.

    Symmetric: scale = clip * max|x| / (2^(bits-1) - 1), codes in [-2^(bits-1), 2^(bits-1) - 1].
    Asymmetric: the range is widened to include 0, scale = clip * (max - min) / (2^bits - 1), and
    x = scale * (code - zero) for code = codes.view(numpy.uint8): the bytes of codes are unsigned.
    search=True takes, per row and group, the clip ratio of least squared error.
    Returns codes [m, k], scales [m, k / group], zeros (None when symmetric). ValueError on NaN.
    """
    return _C.quantize(x, bits, group, symmetric, clip, search)


def dequantize(
    codes: ArrayLike, scales: ArrayLike, zeros: ArrayLike | None = None
) -> NDArray[np.float32]:
    """Values of codes [m, k] under scales [m, groups] (and zeros): float32 [m, k]."""
    return _C.dequantize(codes, scales, zeros)


def pack(codes: ArrayLike) -> NDArray[np.int32]:
    """Pack int4 codes [n, k] in [-8, 7] into words [n, ceil(k / 8)], low nibble first, code + 8."""
    return _C.pack(codes)


def linear(
    x: ArrayLike, weight: PackedWeight, bits: int = 4, clip: float = 1.0
) -> NDArray[np.float32]:
    """y = quantize(x) W^T for x [..., k] and packed int4 weights: float32 [..., n].

    bits: 4 or 8 for symmetric per-token activations (integer products, exact sums), 16 for float.
    clip: ratio of a token's largest absolute value that the codes reach.
    """
    return _C.linear(x, weight, bits, clip)
