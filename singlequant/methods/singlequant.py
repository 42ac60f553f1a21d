# SPDX-License-Identifier: Apache-2.0
"""Hadamard, token-exact ART and uniformity sweeps on both axes."""

from __future__ import annotations

from .axes import (
    SWEEP_ORDER_MAX,
    SWEEP_ROUNDS,
    WEIGHT_SHARE,
    Site,
    factor_bytes as online_bytes,
    sweep_name,
)

__all__ = ["build", "online_bytes"]


def build(
    site: Site,
    hadamard: bool = True,
    art: str = "first",
    rounds: int = SWEEP_ROUNDS,
    weight_share: float = WEIGHT_SHARE,
) -> None:
    """The family that `singlequant` is the best member of; docs/rotations.md compares.

    Hadamard on both axes, token-exact ART, then `rounds` uniformity sweeps of each axis in turn,
    over tokens and weight rows; ART may also come "last", or "no" ART at all. A sweep is what URT
    aims at, the activations' distribution made uniform, with ART's angle generalised from one token
    to all of them.
    """
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
