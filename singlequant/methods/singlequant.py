# SPDX-License-Identifier: Apache-2.0
"""Hadamard, token-exact ART and uniformity sweeps on both axes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..rotations import SiteRotation
from ..statistics import SiteStatistics
from .axes import (
    SWEEP_ORDER_MAX,
    SWEEP_ROUNDS,
    WEIGHT_SHARE,
    Site,
    factor_bytes as online_bytes,
    sweep_name,
)

__all__ = ["build", "choose", "online_bytes", "rounding_error"]

# What `choose` has to choose from; the first of equal ones is taken.
ARRANGEMENTS = ({"art": "no", "rounds": 0}, {"art": "no"}, {"art": "first"})


def build(
    site: Site,
    hadamard: bool = True,
    art: str = "first",
    rounds: int = SWEEP_ROUNDS,
    weight_share: float = WEIGHT_SHARE,
) -> SiteRotation | None:
    """The family that `singlequant` chooses from; docs/rotations.md compares.

    Hadamard on both axes, token-exact ART, then `rounds` uniformity sweeps of each axis in turn,
    over tokens and weight rows; ART may also come "last", or "no" ART at all. A sweep is what URT
    aims at, the activations' distribution made uniform, with ART's angle generalised from one token
    to all of them. art "chosen" tries ARRANGEMENTS, and returns the best.
    """
    if art == "chosen":
        return choose(site)
    site.normalize(weight_share if rounds else 0.0)
    orders = [axis.order for axis in site.axes]
    if hadamard:
        site.apply_hadamard(0)
        site.apply_hadamard(1)
    if art == "first":
        site.art_tokens(0)
        site.art_tokens(1)
    for number in range(rounds):
        for axis in (0, 1):
            if orders[axis] <= SWEEP_ORDER_MAX:
                site.sweep(axis, name=sweep_name(number, rounds))
    if art == "last":
        site.art_tokens(0)
        site.art_tokens(1)
    return None


def choose(site: Site) -> SiteRotation:
    """The arrangement whose rounding changes what the site's linears give least."""
    found = []
    for arrangement in ARRANGEMENTS:
        trial = Site(site.statistics, site.seed, int8_step=0)
        build(trial, **arrangement)
        found.append(trial.rotation())
    return min(found, key=lambda rotation: rounding_error(site.statistics, rotation))


def rounding_error(statistics: SiteStatistics, rotation: SiteRotation) -> float:
    """|y' - y|^2 of the outputs y of the site's kept weight rows for its kept tokens, where y' has
    inputs and weights of 4 bits, rounded to nearest behind the rotation."""
    turn = rotation.core
    x, w = (_C.rotate(np.ascontiguousarray(part, np.float32), turn)
            for part in (statistics.sample, statistics.weights))
    difference = _C.linear_dense(_rounded(x), _rounded(w)) - _C.linear_dense(x, w)
    return float(np.einsum("ij,ij->", difference, difference, dtype=np.float64))


def _rounded(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """x [rows, k] in 4 bits, a scale per row, and back."""
    return _C.dequantize(*_C.quantize(x, 4, 0, True, 1.0))
