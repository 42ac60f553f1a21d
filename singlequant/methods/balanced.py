# SPDX-License-Identifier: Apache-2.0
"""The default: an rms balance, principal directions at 8 bits, then Hadamard and sweeps.

On the first axis the principal directions of the tokens (eigenvectors of the axis Gram matrix,
falling eigenvalues) go first and keep 8 bits (ResQ: Saxena et al., arXiv 2412.14363, section 3); a
Hadamard and the uniformity sweeps mix them among themselves, and the others among themselves.
"""

from __future__ import annotations

from math import lcm

import numpy as np

from .. import _C
from . import singlequant
from .align import align_bytes, align_site as align
from .axes import (
    SWEEP_ORDER_MAX,
    SWEEP_ROUNDS,
    WEIGHT_SHARE,
    Site,
    factor_bytes as online_bytes,
    sweep_name,
)
from .balance import rms_balance as balance

__all__ = ["INT8_SHARE", "align", "align_bytes", "balance", "build", "online_bytes"]

INT8_SHARE = 1 / 4  # of the first axis's directions, the most energetic, that keep 8 bits


def build(site: Site) -> None:
    """Both axes; those of `singlequant` without ART where a site has no room for 8 bits."""
    count = int8_directions(site.k1, site.k2, site.int8_step)
    if count == 0:
        singlequant.build(site, art="no")
        return
    gram = _C.axis_gram(site.statistics.sample, site.k1, site.k2)
    directions = _C.principal_directions(gram)
    parts = ((0, count), (count, site.k1))
    site.normalize(WEIGHT_SHARE)
    mixed = [_C.hadamard_transform(directions[begin:end].T).T for begin, end in parts]
    site.apply_matrix("principal directions", 0, np.concatenate(mixed))
    site.apply_hadamard(1)
    for number in range(SWEEP_ROUNDS):
        name = sweep_name(number, SWEEP_ROUNDS)
        for begin, end in parts:
            site.sweep(0, begin, end, name)
        if site.k2 <= SWEEP_ORDER_MAX:
            site.sweep(1, name=name)
    site.int8_inputs = count * site.k2


def int8_directions(k1: int, k2: int, int8_step: int) -> int:
    """Directions of the first axis that keep 8 bits: whole blocks of int8_step inputs, or 0."""
    if not int8_step:
        return 0
    step = lcm(k2, int8_step) // k2
    count = max(1, round(INT8_SHARE * k1 / step)) * step
    return count if 2 * count <= k1 <= SWEEP_ORDER_MAX else 0
