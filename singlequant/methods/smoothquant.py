# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant, a baseline: Xiao et al., arXiv 2211.10438: a balance of peaks and no rotation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..statistics import SiteStatistics
from .balance import peak_balance

__all__ = ["ALPHA", "balance"]

ALPHA = 0.5  # the paper's, section 5.1


def balance(statistics: SiteStatistics) -> NDArray[np.float64]:
    """[k] the peaks' balance at the paper's alpha."""
    return peak_balance(statistics, ALPHA)
