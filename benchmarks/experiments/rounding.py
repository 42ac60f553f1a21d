# SPDX-License-Identifier: Apache-2.0
"""Ranges of the activations' codes, those that the kernels have and others: float32 in and out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from singlequant import _C

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Range:
    """How a token's scale is chosen. Units of clip, rms and search: see `round_inputs`."""

    clip: float = 1.0
    asymmetric: bool = False
    rms: float = 0.0  # 0: the scale is the maximum's
    search: tuple[float, ...] = ()  # instead of clip, the ratio of least squared error
    group: int = 0  # inputs that share a scale; 0 = all
    bits: int = 4

    def segments(self, k: int) -> int:
        """Scales of k inputs."""
        return -(-k // self.group) if self.group else 1

    @property
    def passes(self) -> int:
        """Times that the quantizer reads a token: for its range, the search's errors, its codes."""
        return 3 if self.search else 2

    @property
    def roundings(self) -> int:
        """Times that an input is rounded."""
        return 1 + len(self.search)


INT8 = Range(bits=8)  # of the block of inputs that keep 8 bits, as in the kernels


def round_inputs(x: Float32, r: Range) -> Float32:
    """Transformed inputs x [m, k] after the quantizer, in float32.

    The largest code stands for clip * max|x| (asymmetric: the codes' span for clip * (max - min),
    zero included), for r.rms root mean squares of the row but max|x| at most, or for that one of
    r.search * max|x| with the least squared error. A last group may be shorter than the others.
    """
    if r.group:
        m, k = x.shape
        padded = np.pad(x, ((0, 0), (0, -k % r.group)))  # zeros widen no range
        rows = round_inputs(padded.reshape(-1, r.group), replace(r, group=0))
        return np.ascontiguousarray(rows.reshape(m, -1)[:, :k])
    if r.rms:
        return _round_to_rms(x, r)
    if not r.search:
        return _C.dequantize(*_C.quantize(x, r.bits, 0, not r.asymmetric, r.clip))
    best, least = None, None
    for ratio in r.search:
        y = _C.dequantize(*_C.quantize(x, r.bits, 0, not r.asymmetric, ratio))
        error = y - x
        error = np.einsum("mk,mk->m", error, error)
        if best is None:
            best, least = y, error
        else:
            better = error < least
            best[better] = y[better]
            least = np.minimum(error, least)
    return best


def _round_to_rms(x: Float32, r: Range) -> Float32:
    half = 2 ** (r.bits - 1)
    rms = np.sqrt(np.einsum("mk,mk->m", x, x) / x.shape[1])
    scale = np.minimum(r.rms * rms, np.abs(x).max(axis=1))[:, None] / np.float32(half - 1)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    codes = x / scale
    np.clip(np.rint(codes, out=codes), -half, half - 1, out=codes)
    return codes * scale


def round_transformed(y: Float32, int8_inputs: int, r: Range) -> Float32:
    """Transformed inputs y [m, k], the leading int8_inputs at 8 bits and the others by r."""
    if not int8_inputs:
        return round_inputs(y, r)
    head, rest = np.ascontiguousarray(y[:, :int8_inputs]), np.ascontiguousarray(y[:, int8_inputs:])
    return np.concatenate([round_inputs(head, INT8), round_inputs(rest, r)], axis=1)
