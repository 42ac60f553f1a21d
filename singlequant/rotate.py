"""Statistics of a site -> its rotation: R1 on the first Kronecker axis, R2 on the second.

A site's input x [k] is reshaped to X [k1, k2]; rotated, it is L X R^T with the factors L and R of
`SiteRotation` (the paper's R1 = L and R2 = R^T). All angles follow from statistics in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from . import _C
from .artifacts import Factor, LayerRotations, LayerStatistics, SiteRotation, SiteStatistics

# Paper, massive outliers: at most this share of the first axis is paired. Threshold: indices above
# the median magnitude count as massive. docs/rotations.md has the table behind the defaults.
PAPER_ART_SHARE = 0.25
PAPER_ART_THRESHOLD = 1.0
SWEEP_ROUNDS = 2  # alternations of the two axes
SWEEP_ELEMENTS, SWEEP_TOKENS_MIN = 1 << 20, 128  # a sweep's sample: wide sites need fewer tokens
WEIGHT_SHARE = 1.0  # of the weight rows in a sweep's sum of fourth powers, the tokens' being 1
SWEEP_ORDER_MAX = 512  # a sweep has n (n - 1) / 2 rotations: longer axes keep H alone

Sample = NDArray[np.float64]  # [tokens, k1, k2]


class _Axis:
    """A factor under construction, and what it did to the sample."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.hadamard = False
        self.pairs: list[NDArray[np.int32]] = []
        self.angles: list[NDArray[np.float64]] = []

    def append(self, pairs: NDArray[np.int32], angles: NDArray[np.float64]) -> int:
        self.pairs.append(pairs)
        self.angles.append(angles)
        return len(angles)

    def factor(self) -> Factor:
        empty = (np.zeros((0, 2), np.int32), np.zeros(0))
        return Factor(
            self.order,
            self.hadamard,
            np.concatenate([empty[0], *self.pairs]),
            np.concatenate([empty[1], *self.angles]),
        )


class _Site:
    """Both axes of one site and its sample, rotated as the axes grow."""

    def __init__(self, statistics: SiteStatistics) -> None:
        self.k1, self.k2 = statistics.k1, statistics.k2
        self.axes = (_Axis(self.k1), _Axis(self.k2))
        self._statistics = statistics
        self.art_steps = self.urt_steps = self.sweep_rotations = 0

    @cached_property
    def sample(self) -> Sample:
        """The sample, rotated by what was found so far; copied when a method first asks for it."""
        return self._statistics.sample.astype(np.float64).reshape(-1, self.k1, self.k2)

    def normalize(self, weight_share: float) -> None:
        """Divide each token by its rms, as its quantization step will be; let weight rows join.

        The rows, divided by theirs, are scaled so that their fourth powers weigh weight_share times
        as much as the tokens'. Of both, evenly spaced ones are taken, as many as a sweep needs.
        """
        self.sample = self._unit_rms(self._statistics.sample)
        if weight_share:
            rows = self._unit_rms(self._statistics.weights)
            balance = weight_share * len(self.sample) / len(rows)
            self.sample = np.concatenate([self.sample, rows * balance**0.25])

    def _unit_rms(self, x: NDArray[np.floating]) -> Sample:
        """Evenly spaced rows of x [rows, k] as [kept, k1, k2], each over its root mean square."""
        limit = max(SWEEP_TOKENS_MIN, SWEEP_ELEMENTS // x.shape[1])
        x = x[:: max(1, -(-len(x) // limit))].astype(np.float64)
        rms = np.sqrt(np.mean(x**2, axis=1, keepdims=True))
        return (x / np.where(rms > 0, rms, 1.0)).reshape(-1, self.k1, self.k2)

    def columns(self, axis: int) -> NDArray[np.float64]:
        """[n, rows] of one axis; rows are tokens times the other axis."""
        moved = np.moveaxis(self.sample, axis + 1, 0)
        return np.ascontiguousarray(moved).reshape(self.axes[axis].order, -1)

    def set_columns(self, axis: int, columns: NDArray[np.float64]) -> None:
        tokens = len(self.sample)
        shape = (self.k1, tokens, self.k2) if axis == 0 else (self.k2, tokens, self.k1)
        self.sample = np.moveaxis(columns.reshape(shape), 0, axis + 1)

    def signed_extremes(self, axis: int) -> NDArray[np.float64]:
        """[n] the entry of largest absolute value of each index of an axis."""
        columns = self.columns(axis)
        peak = np.argmax(np.abs(columns), axis=1)
        return columns[np.arange(len(columns)), peak]

    def apply_hadamard(self, axis: int) -> None:
        self.axes[axis].hadamard = True
        self.set_columns(axis, _C.hadamard_transform(self.columns(axis).T).T)

    def apply_chain(self, axis: int, pairs: NDArray[np.int32], angles: NDArray[np.float64]) -> int:
        self.set_columns(axis, _C.chain_apply(pairs, angles, self.columns(axis).T).T)
        return self.axes[axis].append(pairs, angles)

    def sweep(self, axis: int) -> None:
        pairs, angles, columns = _C.uniformity_sweep(self.columns(axis), 1)
        self.set_columns(axis, columns)
        self.sweep_rotations += self.axes[axis].append(pairs, angles)

    def art_extremes(self, axis: int) -> None:
        steps = max(1, int(PAPER_ART_SHARE * self.axes[axis].order))
        chain = _C.art_extremes(self.signed_extremes(axis), PAPER_ART_THRESHOLD, steps)
        self.art_steps += self.apply_chain(axis, *chain)

    def art_tokens(self, axis: int) -> None:
        chain = _C.art_columns(self.columns(axis), 4 * self.axes[axis].order)
        self.art_steps += self.apply_chain(axis, *chain)

    def urt_flat(self, axis: int) -> None:
        v = self.signed_extremes(axis)
        chain = _C.urt(v, np.where(v < 0, -1.0, 1.0))
        self.urt_steps += self.apply_chain(axis, *chain)


def _hadamard(site: _Site) -> None:
    for axis in site.axes:
        axis.hadamard = True


def _paper(site: _Site, art: bool = True, urt: bool = True) -> None:
    """R1 = R_U1 R_A, R2 = H R_U2: the literal reading."""
    if art:
        site.art_extremes(0)
    if urt:
        site.urt_flat(0)
    site.apply_hadamard(1)
    if urt:
        site.urt_flat(1)


def arrange(
    site: _Site,
    hadamard: bool = True,
    art: str = "no",
    rounds: int = SWEEP_ROUNDS,
    weight_share: float = WEIGHT_SHARE,
) -> None:
    """The family that `singlequant` is the best member of; docs/rotations.md compares.

    Hadamard on both axes, then `rounds` uniformity sweeps of each axis in turn, over tokens and
    weight rows; token-exact ART may come "first" (before the sweeps) or "last". A sweep is what
    URT aims at, the activations' distribution made uniform, with ART's angle generalised from one
    token to all of them.
    """
    site.normalize(weight_share if rounds else 0.0)
    orders = [axis.order for axis in site.axes]
    if hadamard:
        site.apply_hadamard(0)
        site.apply_hadamard(1)
    if art == "first":
        site.art_tokens(0)
        site.art_tokens(1)
    for _ in range(rounds):
        for axis in (0, 1):
            if orders[axis] <= SWEEP_ORDER_MAX:
                site.sweep(axis)
    if art == "last":
        site.art_tokens(0)
        site.art_tokens(1)


METHODS: dict[str, Callable[[_Site], None]] = {
    "none": lambda site: None,
    "hadamard": _hadamard,
    "art": lambda site: _paper(site, urt=False),
    "urt": lambda site: _paper(site, art=False),
    "paper": _paper,
    "singlequant": arrange,
}


def solve_site(
    statistics: SiteStatistics, method: str | Callable[[_Site], None] = "singlequant"
) -> SiteRotation:
    """Rotation of one site from its statistics.

    method: "singlequant" (the default arrangement of Givens rotations and Hadamard), "paper" (the
    literal reading of the paper), "art" and "urt" (the paper with the other one left out),
    "hadamard" (on both axes) or "none"; or a function that builds the site's axes, as experiments
    do. ValueError on another name.
    """
    if not callable(method) and method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    site = _Site(statistics)
    (method if callable(method) else METHODS[method])(site)
    return SiteRotation(
        left=site.axes[0].factor(),
        right=site.axes[1].factor(),
        art_steps=site.art_steps,
        urt_steps=site.urt_steps,
        sweep_rotations=site.sweep_rotations,
    )


def solve_rotations(
    statistics: Iterable[LayerStatistics], method: str = "singlequant"
) -> Iterator[LayerRotations]:
    """Rotations layer by layer; takes what `calibrate` or `load_statistics` yields."""
    for layer in statistics:
        yield solve_layer(layer, method)


def solve_layer(layer: LayerStatistics, method: str = "singlequant") -> LayerRotations:
    """Rotations of one layer's sites."""
    sites = {name: solve_site(site, method) for name, site in layer.sites.items()}
    return LayerRotations(layer.index, sites)
