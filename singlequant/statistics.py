# SPDX-License-Identifier: Apache-2.0
"""What calibration knows of a site's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False, repr=False)
class SiteStatistics:
    """Sums of squares and extremes of a site's inputs x [k], k = k1 * k2, over all tokens."""

    k1: int
    k2: int
    count: int  # tokens
    min: NDArray[np.float64]  # [k]
    max: NDArray[np.float64]  # [k]
    sum2: NDArray[np.float64]  # [k] sum of squares
    sample: NDArray[np.float32]  # [tokens kept, k], evenly spaced
    weights: NDArray[np.float32]  # [rows kept, k] of the site's linears, evenly spaced
    weight_max: NDArray[np.float64]  # [k] largest magnitude of a column of the site's linears
    weight_sum2: NDArray[np.float64]  # [k] sum of squares of a column
    gram: NDArray[np.float64]  # [k / b, b, b] sums of the outer products of blocks of b inputs
    weight_gram: NDArray[np.float64]  # [k / b, b, b] the same over the rows of the site's linears
    shared: tuple[int, int, int]  # k = a * b * c; inputs that differ in b share one producer
    reads: str = "mlp"  # what the site reads: the "residual" stream, "attention" or the "mlp"
    foldable: bool = True  # whether what produces the inputs can take a balance
    borrowed: bool = False  # of the layer's union: the site's expert saw too few tokens
    inputs: NDArray[np.float32] | None = None  # [count, k] if kept, while the layer is processed

    @property
    def block(self) -> int:
        """Inputs of a block of the Gram matrices: a value head's, or k2."""
        return self.gram.shape[1]

    def __repr__(self) -> str:
        return (
            f"SiteStatistics({self.k1}x{self.k2}, {self.count} tokens, {len(self.sample)} kept, "
            f"{len(self.weights)} weight rows)"
        )


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one layer's sites."""

    index: int
    sites: Mapping[str, SiteStatistics]
    kv_largest: float = 0.0  # largest magnitude of its keys and values
