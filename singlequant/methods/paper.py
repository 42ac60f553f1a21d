# SPDX-License-Identifier: Apache-2.0
"""The literal reading of the paper (arXiv 2511.22316): ART, URT and a Hadamard.

Methods `art` and `urt` are its variants with the other part left out.
"""

from __future__ import annotations

from .axes import Site, factor_bytes as online_bytes

__all__ = ["ART_SHARE", "ART_THRESHOLD", "URT_THRESHOLD", "build", "online_bytes"]

# Massive outliers: at most this share of the first axis is paired. Threshold: indices above the
# median magnitude count as massive. docs/rotations.md has the table behind the defaults.
ART_SHARE = 0.25
ART_THRESHOLD = 1.0
URT_THRESHOLD = 0.0  # normal outliers: the same for URT; 0 = all indices take part


def build(
    site: Site,
    art: bool = True,
    urt: bool = True,
    art_threshold: float = ART_THRESHOLD,
    art_share: float = ART_SHARE,
    urt_threshold: float = URT_THRESHOLD,
) -> None:
    """R1 = R_U1 R_A, R2 = H R_U2. Thresholds are times the median."""
    if art:
        site.art_extremes(0, art_threshold, art_share)
    if urt:
        site.urt_flat(0, urt_threshold)
    site.apply_hadamard(1)
    if urt:
        site.urt_flat(1, urt_threshold)
