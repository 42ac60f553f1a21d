# SPDX-License-Identifier: Apache-2.0
"""A balance: a factor per channel that folds into what produces the site's input."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..statistics import SiteStatistics

BALANCE_LOG_MAX = 12.0  # a balance stays within e^12 of its geometric mean: float32 has room

BLOCK = 32  # inputs of a block of `block_balance`: those of llama.cpp's 4-bit formats
BLOCK_STEPS = 30
BLOCK_RATE, BLOCK_DECAY = 0.15, 0.95  # of the first step, and of each step from the one before
SHARE_LEAST = 1e-3  # added to shares, so that an input without any moves by steps that end


def rms_balance(s: SiteStatistics) -> NDArray[np.float64]:
    """[k] (rms_x / rms_W)^(1/2): activations and weights get the same rms in each channel.

    It minimises the product of the two sums of squares, hence the error that noise in proportion
    to either's size makes.
    """
    x2, w2 = (_shared(a, s.shared, np.mean) for a in (s.sum2 / max(s.count, 1), s.weight_sum2))
    return _unit_mean(x2, w2, 0.25, 0.25)


def peak_balance(s: SiteStatistics, alpha: float) -> NDArray[np.float64]:
    """[k] max|x|^alpha / max|W|^(1 - alpha): SmoothQuant (arXiv 2211.10438), equation 4."""
    peaks = (np.maximum(np.abs(s.min), np.abs(s.max)), s.weight_max)
    x, w = (_shared(a, s.shared, np.max) for a in peaks)
    return _unit_mean(x, w, alpha, 1 - alpha)


def block_balance(s: SiteStatistics) -> NDArray[np.float64] | None:
    """[k] for weights that are rounded by blocks of BLOCK inputs with a scale of the block's peak.

    A row's scale in a block is proportional to its peak, and each of the block's weights has an
    error of that size. Over the rows n and the inputs c of a block the error of the outputs is then

        (sum over n of max_c (W_nc s_c)^2) (sum over c of E x_c^2 / s_c^2)

    for a balance s. Where it is least, each input has the same share in both sums: of the first it
    has the rows whose peak it is. Steps move s towards that; of all of them the best one is taken.
    Each block has geometric mean 1. None where blocks do not divide the inputs.
    """
    k = s.k1 * s.k2
    if k % BLOCK:
        return None
    x2 = s.sum2 / max(s.count, 1)
    log = found = np.zeros(k)
    least, rate = np.inf, BLOCK_RATE
    for _ in range(BLOCK_STEPS):
        scale = np.exp(log).astype(np.float32)
        peaks = _C.block_peaks(s.weights, scale, BLOCK).reshape(-1, BLOCK)
        noise = (x2 / np.square(scale, dtype=np.float64)).reshape(-1, BLOCK)
        error = float(peaks.sum(axis=1) @ noise.sum(axis=1))
        if error < least:
            least, found = error, log
        move = np.log((_shares(noise) + SHARE_LEAST) / (_shares(peaks) + SHARE_LEAST))
        move -= move.mean(axis=1, keepdims=True)
        log = _shared(log + rate * move.reshape(-1), s.shared, np.mean)
        rate *= BLOCK_DECAY
    return np.exp(found)


def _shares(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows over their sums; those of zeros in equal shares."""
    sums = parts.sum(axis=1, keepdims=True)
    return np.divide(parts, sums, out=np.full_like(parts, 1 / parts.shape[1]), where=sums > 0)


def _shared(values: NDArray[np.float64], shared: tuple[int, int, int], by) -> NDArray[np.float64]:
    """Values that agree where inputs come from one producer."""
    folded = values.reshape(shared)
    return np.broadcast_to(by(folded, axis=1, keepdims=True), shared).reshape(-1)


def _unit_mean(
    x: NDArray[np.float64], w: NDArray[np.float64], x_power: float, w_power: float
) -> NDArray[np.float64]:
    """x^x_power / w^w_power with geometric mean 1; dead channels get 1."""
    live = (x > 0) & (w > 0)
    log = np.zeros_like(x)
    log[live] = x_power * np.log(x[live]) - w_power * np.log(w[live])
    log[live] -= log[live].mean() if live.any() else 0.0
    return np.exp(np.clip(log, -BALANCE_LOG_MAX, BALANCE_LOG_MAX))
