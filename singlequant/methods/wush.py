# SPDX-License-Identifier: Apache-2.0
"""WUSH, a baseline: Chen et al., arXiv 2512.00956.

Each block of inputs takes T = H S^(-1/2) U^T W'^T: with the Cholesky factors W' of the weights'
second moments and X' of the inputs', U S V^T is the singular value decomposition of W'^T X'. That
is the alignment that makes both second moments the same diagonal matrix, and a Hadamard of the
block's own behind it. Nothing mixes the blocks. They have k2 inputs; value heads fold into v and o.
"""

from __future__ import annotations

import numpy as np

from .. import _C
from ..rotations import Alignment, Factor
from ..statistics import SiteStatistics
from .align import align_bytes, align_heads_or_blocks
from .axes import Site, factor_bytes as online_bytes

__all__ = ["DAMPING", "align", "align_bytes", "build", "online_bytes"]

DAMPING = 0.01  # share of the diagonals, as in CAT


def align(statistics: SiteStatistics) -> Alignment | None:
    """The whole transform of each value head or block, its Hadamard included."""
    found = align_heads_or_blocks(statistics, DAMPING, symmetric=False)
    if found is None or found.folded:  # folded ones have their Hadamard
        return found
    b = statistics.block
    return found.times(Factor(b, True, np.empty((0, 2), np.int32), np.empty(0)))


def build(site: Site) -> None:
    """Nothing: the alignment is all; a Hadamard of k2 where a site has none."""
    if not 1 < site.statistics.block <= _C.FACTOR_DENSE_MAX:
        site.set_hadamard(1)
