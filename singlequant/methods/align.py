# SPDX-License-Identifier: Apache-2.0
"""Alignment: the invertible blocks that give a site's inputs and weights the same Gram matrix.

No rotation changes how much of the weights' energy lies where the inputs have theirs. For x' = x M
and W' = W M^-T the product of the two sums of squares is least with M M^T = S_x^-1 # S_w, the
matrix geometric mean of the two Gram matrices (CAT, arXiv 2603.04359; WUSH, arXiv 2512.00956). The
rms balance is its diagonal case.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..rotations import FACTOR_DENSE_MAX, Alignment
from ..statistics import SiteStatistics

DAMPING = 0.1  # share of each diagonal entry that is added to it


def align_site(s: SiteStatistics) -> Alignment | None:
    """The alignment of a site: of its value heads, folded into v and o, or of blocks of k2 inputs.

    None for attention's output where v cannot take it.
    """
    if s.reads == "attention":
        return align_values(s, DAMPING, symmetric=True)
    return align_blocks(s, DAMPING, symmetric=False)


def align_heads_or_blocks(
    s: SiteStatistics, damping: float, symmetric: bool
) -> Alignment | None:
    """`align_values` where v can take the blocks, `align_blocks` elsewhere."""
    return align_values(s, damping, symmetric) or align_blocks(s, damping, symmetric)


def align_bytes(reads: str, k: int) -> int:
    """Bytes that an alignment adds to a stored rotation: blocks in 16 bits for the right factor."""
    k2 = _C.factor_sizes(k)[1]
    return 0 if reads == "attention" or k2 == 1 else 2 * k * k2 - 4 * k2 * k2


def align_blocks(s: SiteStatistics, damping: float, symmetric: bool) -> Alignment | None:
    """Blocks of the statistics' size, multiplied by at inference.

    None where they would be of one input, or larger than a dense factor.
    """
    if not 1 < s.block <= FACTOR_DENSE_MAX:
        return None
    return Alignment(*_solved(s.gram / max(s.count, 1), s.weight_gram, damping, symmetric))


def align_values(s: SiteStatistics, damping: float, symmetric: bool) -> Alignment | None:
    """Blocks of value heads, which v's rows take; queries that share a head share its block.

    A Hadamard behind each block spreads the energy over the head, as the KV cache wants it. None
    where v cannot take them.
    """
    if s.reads != "attention" or not s.foldable:
        return None
    grams = (s.gram / max(s.count, 1), s.weight_gram)
    heads, queries, d = s.shared
    shared = (gram.reshape(heads, queries, d, d).sum(axis=1) for gram in grams)
    spread = _C.hadamard_transform(np.eye(d)).T  # rows times H^T
    blocks = (np.repeat(m @ spread, queries, axis=0)
              for m in _solved(*shared, damping, symmetric))
    return Alignment(*blocks, folded=True)


def _solved(
    x_gram: NDArray[np.float64], w_gram: NDArray[np.float64], damping: float, symmetric: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """M and M^-T [count, b, b], their determinants' geometric mean 1."""
    m, inverse_t = _C.align_blocks(x_gram, w_gram, damping, symmetric)
    scale = np.exp(np.linalg.slogdet(m)[1].mean() / m.shape[1])
    return m / scale, inverse_t * scale
