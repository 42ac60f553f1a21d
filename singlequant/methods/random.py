# SPDX-License-Identifier: Apache-2.0
"""A random orthogonal factor on each axis, drawn by the seed: a baseline."""

from __future__ import annotations

from .. import _C
from .axes import SWEEP_ORDER_MAX, Site, factor_bytes as online_bytes

__all__ = ["build", "online_bytes"]


def build(site: Site) -> None:
    """Two random orthogonal factors, different ones on the two axes."""
    for axis, order in enumerate((site.k1, site.k2)):
        if order <= SWEEP_ORDER_MAX:
            matrix = _C.random_orthogonal(order, 2 * site.seed + axis)
            site.apply_matrix("random rotation", axis, matrix)
        else:  # longer axes, of k with a large prime, keep H
            site.apply_hadamard(axis)
