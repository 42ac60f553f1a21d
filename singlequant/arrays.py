"""The array functions: rotations, quantizers, packing and linears on NumPy arrays.

They need no model. Letters: m is the number of tokens (or rows), n of outputs, k = k1 * k2 of
inputs, and g is the length of a group along k.

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
    """An orthonormal [n, n] matrix whose entries have nearly the same size, for every n >= 1.

    It is a Sylvester, Paley or Hartley matrix, or a Kronecker product of these. ValueError for
    n < 1.
    """
    return _C.hadamard_matrix(n)


def art(x: ArrayLike, max_steps: int | None = None) -> Chain:
    """The chain of the alignment rotation (ART), which lowers massive outliers.

    x: [rows, n], a sample of activations along one axis, one row per token. A step pairs two
    channels: the one with the largest absolute value (the peak), and the one whose largest absolute
    value is smallest. It takes their two values in the row of the peak and rotates the pair so that
    both get the same magnitude (`givens_angle`). Steps end when the peak no longer falls, or after
    max_steps (default 2 n). Returns the chain: pairs [steps, 2] and angles [steps] in radians.
    ValueError if x does not have 2 dimensions.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2:
        raise ValueError(f"x: expected 2 dimensions (rows, n), got {x.ndim}")
    return _C.art_columns(x.T, 2 * x.shape[1] if max_steps is None else max_steps)


def urt(v: ArrayLike, u: ArrayLike | None = None) -> Chain:
    """The chain of the uniformity rotation (URT), U = G_u^T G_v, which maps the vector v onto u.

    v: [n], statistics of one axis. u: [n], the target, which is rescaled to the norm of v. The
    default target is flat, with the signs of v. The chain has at most 2 (n - 1) Givens rotations.
    Returns pairs [steps, 2] and angles [steps] in radians.
    """
    v = np.asarray(v, np.float64)
    return _C.urt(v, np.where(v < 0, -1.0, 1.0) if u is None else u)


def uniformity_sweep(x: ArrayLike, sweeps: int = 1) -> Chain:
    """The chain that rotates every pair of channels once per sweep to the least fourth powers.

    x: [rows, n], a sample of activations along one axis. The angle of a pair (a, b) minimizes the
    sum of fourth powers over the rows. It has a closed form,
    theta = (pi - arg sum (a + i b)^4) / 4, which for one row equals `givens_angle`. Returns pairs
    [steps, 2] and angles [steps] in radians. ValueError if x does not have 2 dimensions.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2:
        raise ValueError(f"x: expected 2 dimensions (rows, n), got {x.ndim}")
    pairs, angles, _ = _C.uniformity_sweep(x.T, sweeps)
    return pairs, angles


def apply_chain(chain: Chain, x: ArrayLike) -> NDArray[np.float64]:
    """x [..., n] with a chain of Givens rotations applied along the last axis, in float64."""
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
    """Quantize x [m, k] to 4 or 8 bits, with one scale per row or per group of columns.

    group: columns that share a scale; 0 means all of a row.
    symmetric: scale = clip * max|x| / (2^(bits-1) - 1), and codes are in
    [-2^(bits-1), 2^(bits-1) - 1]. If False, the range is widened to include 0, scale =
    clip * (max - min) / (2^bits - 1), and x = scale * (code - zero). The bytes of codes are then
    unsigned: code = codes.view(numpy.uint8).
    search: whether to choose the clip ratio of least squared error for each row and group.
    Returns codes [m, k], scales [m, k / group] and zeros (None when symmetric). ValueError if x
    holds NaN.
    """
    return _C.quantize(x, bits, group, symmetric, clip, search)


def dequantize(
    codes: ArrayLike, scales: ArrayLike, zeros: ArrayLike | None = None
) -> NDArray[np.float32]:
    """The values that codes [m, k] stand for with scales [m, groups] and zeros: float32 [m, k]."""
    return _C.dequantize(codes, scales, zeros)


def pack(codes: ArrayLike) -> NDArray[np.int32]:
    """Pack int4 codes [n, k] in [-8, 7] into words [n, ceil(k / 8)].

    A word is an int32 that holds code + 8 of 8 codes, the first in the lowest 4 bits.
    """
    return _C.pack(codes)


def linear(
    x: ArrayLike, weight: PackedWeight, bits: int = 4, clip: float = 1.0
) -> NDArray[np.float32]:
    """y = quantize(x) W^T for x [..., k] and packed int4 weights: float32 [..., n].

    bits: 4 or 8 quantizes each token of x symmetrically, with integer products and exact sums.
    16 leaves x in float32. clip: the share of a token's largest absolute value that the codes
    reach.
    """
    return _C.linear(x, weight, bits, clip)
