# SPDX-License-Identifier: Apache-2.0
"""CAT, a baseline: Federici et al., arXiv 2603.04359, concentration-alignment transforms.

Block by block the symmetric M = (S_w # S_x^-1)^(1/2) aligns activations and weights; a Hadamard of
all inputs then concentrates both. Blocks have k2 inputs; value heads fold into v and o.
"""

from __future__ import annotations

from ..rotations import Alignment
from ..statistics import SiteStatistics
from .align import align_bytes, align_heads_or_blocks
from .axes import factor_bytes as online_bytes
from .hadamard import build

__all__ = ["DAMPING", "align", "align_bytes", "build", "online_bytes"]

DAMPING = 0.01  # share of the diagonals: covariances of few tokens have no inverse


def align(statistics: SiteStatistics) -> Alignment | None:
    """The symmetric alignment of a site's value heads or blocks."""
    return align_heads_or_blocks(statistics, DAMPING, symmetric=True)
