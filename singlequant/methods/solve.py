# SPDX-License-Identifier: Apache-2.0
"""Statistics of a site -> its transformation, by the registry's methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..config import INT8_STEP, QuantConfig
from ..rotations import Alignment, BlockRotation, LayerRotations, SiteRotation
from ..statistics import LayerStatistics, SiteStatistics
from .axes import Site
from .registry import DEFAULT_METHOD, Method, find_method

# A method builds the site's axes, or returns a rotation of its own.
Build = Callable[[Site], BlockRotation | SiteRotation | None]


def solve_site(
    statistics: SiteStatistics,
    method: str | Build = DEFAULT_METHOD,
    seed: int = 0,
    int8_step: int = INT8_STEP,
) -> SiteRotation | BlockRotation:
    """Transformation of one site from its statistics.

    method: a name of the registry, or a function that builds the site's axes, as experiments do.
    A method of the registry balances the inputs where its row says so and something can take the
    balance. int8_step: inputs keep 8 bits in blocks of so many; 0: none do. ValueError on another
    name.
    """
    if callable(method):
        return _built(statistics, method, seed, int8_step, None)
    row = find_method(method)
    balance = site_balance(statistics, row)
    if statistics.reads not in row.rotates:
        return Site(statistics).rotation(balance)
    if balance is not None:
        statistics = balanced_statistics(statistics, balance)
    align = site_alignment(statistics, row)
    if align is None:
        return _built(statistics, row.build, seed, int8_step, balance)
    found = _built(aligned_statistics(statistics, align), row.build, seed, int8_step, None)
    return replace(found, **_behind(balance, align))


def site_balance(statistics: SiteStatistics, method: Method) -> NDArray[np.float32] | None:
    """The balance [k] that the method gives a site; None where it gives none."""
    if statistics.reads not in method.balances or not statistics.foldable:
        return None
    return method.implementation().balance(statistics).astype(np.float32)


def site_alignment(statistics: SiteStatistics, method: Method) -> Alignment | None:
    """The alignment that the method gives a site with these (balanced) statistics, or None."""
    if statistics.reads not in method.aligns:
        return None
    return method.implementation().align(statistics)


def _behind(balance: NDArray[np.float32] | None, align: Alignment) -> dict[str, Any]:
    """Balance and alignment of a rotation; a folded alignment takes the balance in."""
    if balance is None or not align.folded:
        return {"balance": balance, "align": align}
    scale = balance.astype(np.float64).reshape(-1, align.matrices.shape[1], 1)
    return {"balance": None,
            "align": Alignment(align.matrices / scale, align.inverse_t * scale, folded=True)}


def balanced_statistics(s: SiteStatistics, balance: NDArray[np.float32]) -> SiteStatistics:
    """The statistics that a method builds from, of balanced inputs and weights."""
    scale = balance.astype(np.float64).reshape(-1, s.block)
    outer = scale[:, :, None] * scale[:, None, :]
    return replace(s, sample=s.sample / balance, weights=s.weights * balance,
                   gram=s.gram / outer, weight_gram=s.weight_gram * outer)


def aligned_statistics(s: SiteStatistics, align: Alignment) -> SiteStatistics:
    """The sample and the weights behind an alignment."""
    x, w = (_C.Rotation(align.k, align=blocks.astype(np.float32))
            for blocks in (align.matrices, align.inverse_t))
    return replace(s, sample=_C.rotate(s.sample, x), weights=_C.rotate(s.weights, w))


def _built(
    statistics: SiteStatistics, build: Build, seed: int, int8_step: int,
    balance: NDArray[np.float32] | None,
) -> SiteRotation | BlockRotation:
    site = Site(statistics, seed, int8_step)
    found = build(site)
    return site.rotation(balance) if found is None else replace(found, balance=balance)


def config_int8_step(config: QuantConfig) -> int:
    """Inputs of a block that config's method keeps at 8 bits; 0 where it keeps none."""
    if not find_method(config.method).int8_inputs or config.activation_bits != 4:
        return 0
    return config.group_size or INT8_STEP


def solve_rotations(
    statistics: Iterable[LayerStatistics],
    method: str | QuantConfig = DEFAULT_METHOD,
    seed: int = 0,
) -> Iterator[LayerRotations]:
    """Rotations layer by layer; takes what `calibrate` or `load_statistics` yields.

    method: a name, or the config that the rotations are for, which has its own seed.
    """
    for layer in statistics:
        yield solve_layer(layer, method, seed)


def solve_layer(
    layer: LayerStatistics, method: str | QuantConfig = DEFAULT_METHOD, seed: int = 0
) -> LayerRotations:
    """Rotations of one layer's sites; those that the method leaves alone are absent.

    The statistics of a method that rotates the residual stream are of its view of the checkpoint.
    """
    step = INT8_STEP
    if isinstance(method, QuantConfig):
        step, method, seed = config_int8_step(method), method.method, method.seed
    row = find_method(method)
    sites = {
        name: solve_site(site, method, seed, step)
        for name, site in layer.sites.items()
        if site.reads in (*row.rotates, *row.balances)
    }
    return LayerRotations(layer.index, sites, layer)
