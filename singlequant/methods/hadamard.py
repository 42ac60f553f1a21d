# SPDX-License-Identifier: Apache-2.0
"""The Hadamard matrix on both axes: a baseline that looks at no data."""

from __future__ import annotations

from .axes import Site, factor_bytes as online_bytes

__all__ = ["build", "online_bytes"]


def build(site: Site) -> None:
    """A Hadamard on each axis."""
    site.set_hadamard(0)
    site.set_hadamard(1)
