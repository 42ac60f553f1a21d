# SPDX-License-Identifier: Apache-2.0
"""What calibration knows of a site's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .html import facts_html, table_html


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

    @property
    def rms(self) -> NDArray[np.float64]:
        """Root mean square of each input over all tokens [k]."""
        return np.sqrt(self.sum2 / max(1, self.count))

    @property
    def largest(self) -> NDArray[np.float64]:
        """Largest magnitude of each input over all tokens [k]."""
        return np.maximum(np.abs(self.min), np.abs(self.max))

    def _repr_html_(self) -> str:
        return facts_html("SiteStatistics", dict(zip(SITE_COLUMNS, _site_cells(self), strict=True)))


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one layer's sites."""

    index: int
    sites: Mapping[str, SiteStatistics]
    kv_largest: float = 0.0  # largest magnitude of its keys and values
    kv_least: float = 0.0  # largest magnitude of its keys or of its values: of those that are less

    def _repr_html_(self) -> str:
        cells = [_site_cells(site) for site in self.sites.values()]
        columns = [[name, *values] for name, values in
                   zip(SITE_COLUMNS, zip(*cells, strict=True), strict=True)]
        return table_html(f"Layer {self.index}: inputs of its sites",
                          [["site", *self.sites], *columns])

    def inputs_of(self, site: str) -> NDArray[np.float32] | None:
        """The inputs of a site, if kept: nothing else of its statistics is computed for them."""
        if isinstance(self.sites, SitesInTurn):
            return self.sites.inputs[site]
        return self.sites[site].inputs

    def borrowed(self, site: str) -> bool:
        """Whether a site is calibrated on the union of its layer's experts."""
        if isinstance(self.sites, SitesInTurn):
            return site in self.sites.union
        return self.sites[site].borrowed


SITE_COLUMNS = ("inputs", "tokens", "largest |x|", "median rms", "largest / median rms")


def _site_cells(site: SiteStatistics) -> list[str]:
    """Values under SITE_COLUMNS: the last one says how far outlier channels stand out."""
    rms = site.rms
    median = float(np.median(rms))
    ratio = f"{rms.max() / median:.1f}" if median > 0 else "-"
    return [f"{site.k1 * site.k2} = {site.k1} x {site.k2}", str(site.count),
            f"{site.largest.max():.4g}", f"{median:.4g}", ratio]


class SitesInTurn(Mapping[str, SiteStatistics]):
    """Statistics by site, those of experts computed when they are asked for, one at a time.

    A layer of 128 experts has 256 such sites. The statistics of all of them take more memory than
    the inputs that they are of, which this holds. inputs: by site. union: sites that have the
    layer's union in place of their own. make(site): the statistics.
    """

    def __init__(
        self, ready: Mapping[str, SiteStatistics], inputs: Mapping[str, NDArray[np.float32]],
        union: frozenset[str], make: Callable[[str], SiteStatistics],
    ) -> None:
        self.inputs, self.union = inputs, union
        self._ready, self._make = ready, make

    def __getitem__(self, site: str) -> SiteStatistics:
        if site in self._ready:
            return self._ready[site]
        if site not in self.inputs:
            raise KeyError(site)
        return self._make(site)

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)
