# SPDX-License-Identifier: Apache-2.0
"""DuQuant, a baseline: Lin et al., arXiv 2406.01721, section 3.2, as the paper states it.

x' = x R1 P R2: a block-diagonal rotation built greedily around the outlier channels, a zigzag
permutation that balances the blocks, a second block-diagonal rotation. The paper's diagonal
smoothing is the balance before it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..rotations import BlockRotation
from ..statistics import SiteStatistics
from .axes import TENSOR_HEADER_BYTES, Site
from .balance import peak_balance

__all__ = ["ALPHA", "BLOCK", "GREEDY_STEPS", "balance", "block_size", "build", "online_bytes"]

ALPHA = 0.6  # the paper's balance of peaks
BLOCK = 128  # the paper's 2^n, section 4.1
GREEDY_STEPS = 256  # the paper's N, section 4.1
USEFUL_POWER = 16  # below this, a power of two mixes too few channels


def block_size(k: int) -> int:
    """Channels of a block: the largest power of two up to 128 that divides k.

    Where that is below 16, the largest divisor of k up to 128 (the paper's 2^n has no answer
    there); 1, which leaves the input as it is, when k is a prime above 128.
    """
    power = min(k & -k, BLOCK)
    if power >= USEFUL_POWER:
        return power
    return max(b for b in range(1, BLOCK + 1) if k % b == 0)


@lru_cache(maxsize=4)
def _steps(b: int, seed: int) -> NDArray[np.float32]:
    """The random matrices R~ Q [N, b, b] of the greedy steps, shared by all blocks and sites."""
    steps = _C.duquant_steps(b, GREEDY_STEPS, seed)
    steps.flags.writeable = False
    return steps


def _rotate(x: NDArray[np.float32], blocks: NDArray[np.float32]) -> NDArray[np.float32]:
    """x [rows, k] times blockdiag(blocks)."""
    count, b, _ = blocks.shape
    return np.matmul(x.reshape(len(x), count, 1, b), blocks).reshape(x.shape)


def balance(statistics: SiteStatistics) -> NDArray[np.float64]:
    """[k] the peaks' balance at the paper's alpha."""
    return peak_balance(statistics, ALPHA)


def online_bytes(k: int) -> int:
    """Bytes of a site's two stored block rotations and their permutation."""
    return 3 * TENSOR_HEADER_BYTES + 4 * k * (2 * block_size(k) + 1)


def build(site: Site) -> BlockRotation:
    """DuQuant's rotation of one site, on the tokens that its statistics keep.

    The random matrices are drawn once for the first rotations and once for the second; each block
    has its own outlier channels and its own number of steps. Bytes repeat on equal instruction
    sets only: the greedy choice may turn on a last bit. ValueError for NaN or Inf in the sample.
    """
    x, seed = site.statistics.sample, site.seed
    b = block_size(x.shape[1])
    first, _ = _C.duquant_blocks(x, _steps(b, 2 * seed))
    x = _rotate(x, first)
    permutation = np.arange(x.shape[1])
    if b > 1:
        permutation = _C.zigzag(np.abs(x).max(axis=0, initial=0.0), b)
    second, _ = _C.duquant_blocks(x[:, permutation], _steps(b, 2 * seed + 1))
    return BlockRotation(first, permutation, second)
