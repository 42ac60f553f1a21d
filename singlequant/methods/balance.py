# SPDX-License-Identifier: Apache-2.0
"""A balance: a factor per channel that folds into what produces the site's input."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..statistics import SiteStatistics

BALANCE_LOG_MAX = 12.0  # a balance stays within e^12 of its geometric mean: float32 has room


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
