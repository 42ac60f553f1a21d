# SPDX-License-Identifier: Apache-2.0
"""The gain that balance and alignment promise at a site, from its statistics alone.

A quantizer's noise has the energy of what it rounds, times a factor. The rounding errors e of a
site's inputs x and d of its weight rows W give its outputs the noise e W^T + x d^T. With S_x and
S_w, the Gram matrices of inputs and weight rows, and k inputs, the energy of both terms is

    tr(S_x) tr(S_w) / k

times the quantizer's factor, where noise is spread evenly over the inputs, as a Hadamard behind the
matrix sees to. For x M and W M^-T it is

    tr(M^T S_x M) tr(M^-1 S_w M^-T) / k

An alignment makes this product least (CAT, arXiv 2603.04359); of all diagonal M, the rms balance
does. The gain is 10 log10 of the first over the second, in dB of the outputs' signal-to-noise
ratio: the outputs stay the same.
"""

from __future__ import annotations

import numpy as np

from .. import _C
from ..statistics import SiteStatistics
from .align import DAMPING, align_heads_or_blocks
from .balance import rms_balance


def balance_gain(s: SiteStatistics) -> float | None:
    """The rms balance's predicted gain in dB over the site as it is.

    None where nothing can take a balance, or where inputs or weights are all 0.
    """
    if not s.foldable:
        return None
    balance2 = rms_balance(s) ** 2
    after = np.sum(s.sum2 / balance2) * np.sum(s.weight_sum2 * balance2)
    return _decibels(s.sum2.sum() * s.weight_sum2.sum(), after)


def alignment_gain(s: SiteStatistics) -> float | None:
    """The predicted gain in dB of aligning the site over leaving it as it is.

    The alignment is that of method `aligned`, of value heads or blocks, at a site without a balance
    before it, which it contains. Its damping costs a part of the least product. None where a site
    can have no blocks, or where inputs or weights are all 0.
    """
    align = align_heads_or_blocks(s, DAMPING, symmetric=False)
    if align is None:
        return None
    before = (np.trace(gram, axis1=1, axis2=2).sum() for gram in (s.gram, s.weight_gram))
    after = (_C.block_energy(gram, m).sum()
             for gram, m in ((s.gram, align.matrices), (s.weight_gram, align.inverse_t)))
    return _decibels(np.prod(list(before)), np.prod(list(after)))


def _decibels(before: float, after: float) -> float | None:
    """10 log10 of the ratio; None where there is none."""
    return float(10 * np.log10(before / after)) if before > 0 and after > 0 else None
