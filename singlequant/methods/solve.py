"""Statistics of a site -> its rotation: R1 on the first Kronecker axis, R2 on the second.

A site's input x [k] is reshaped to X [k1, k2]; rotated, it is L X R^T with the factors L and R of
`SiteRotation` (the paper's R1 = L and R2 = R^T). All angles follow from statistics in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..config import BALANCED_SITES, DEFAULT_METHOD, HIGH_STEP, QuantConfig
from ..rotations import BlockRotation, Factor, LayerRotations, SiteRotation
from ..statistics import LayerStatistics, SiteStatistics
from .duquant import solve_site_duquant

# Paper, massive outliers: at most this share of the first axis is paired. Threshold: indices above
# the median magnitude count as massive. docs/rotations.md has the table behind the defaults.
PAPER_ART_SHARE = 0.25
PAPER_ART_THRESHOLD = 1.0
PAPER_URT_THRESHOLD = 0.0  # normal outliers: the same for URT; 0 = all indices take part
SWEEP_ROUNDS = 2  # alternations of the two axes
SWEEP_ELEMENTS, SWEEP_TOKENS_MIN = 1 << 20, 128  # a sweep's sample: wide sites need fewer tokens
WEIGHT_SHARE = 1.0  # of the weight rows in a sweep's sum of fourth powers, the tokens' being 1
HIGH_SHARE = 1 / 8  # of the first axis's directions, the most energetic, that keep 8 bits
SMOOTHQUANT_ALPHA, DUQUANT_ALPHA = 0.5, 0.6  # their papers' balance of peaks
BALANCE_LOG_MAX = 12.0  # a balance stays within e^12 of its geometric mean: float32 has room
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

    def __init__(
        self, statistics: SiteStatistics, seed: int = 0, high_step: int = HIGH_STEP
    ) -> None:
        self.k1, self.k2 = statistics.k1, statistics.k2
        self.seed, self.high_step = seed, high_step
        self.axes = (_Axis(self.k1), _Axis(self.k2))
        self.statistics = statistics
        self.art_steps = self.urt_steps = self.sweep_rotations = self.high = 0

    @cached_property
    def sample(self) -> Sample:
        """The sample, rotated by what was found so far; copied when a method first asks for it."""
        return self.statistics.sample.astype(np.float64).reshape(-1, self.k1, self.k2)

    def normalize(self, weight_share: float) -> None:
        """Divide each token by its rms, as its quantization step will be; let weight rows join.

        The rows, divided by theirs, are scaled so that their fourth powers weigh weight_share times
        as much as the tokens'. Of both, evenly spaced ones are taken, as many as a sweep needs.
        """
        self.sample = self._unit_rms(self.statistics.sample)
        if weight_share:
            rows = self._unit_rms(self.statistics.weights)
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

    def apply_matrix(self, axis: int, matrix: NDArray[np.float64]) -> int:
        """An orthogonal matrix as a chain of Givens rotations."""
        return self.apply_chain(axis, *_C.chain_from_matrix(matrix))

    def sweep(self, axis: int, begin: int = 0, end: int | None = None) -> None:
        """One uniformity sweep of an axis's indices begin .. end - 1 (all of them)."""
        columns = self.columns(axis)
        pairs, angles, columns[begin:end] = _C.uniformity_sweep(columns[begin:end], 1)
        self.set_columns(axis, columns)
        self.sweep_rotations += self.axes[axis].append(pairs + np.int32(begin), angles)

    def art_extremes(self, axis: int, threshold: float, share: float) -> None:
        steps = max(1, int(share * self.axes[axis].order))
        chain = _C.art_extremes(self.signed_extremes(axis), threshold, steps)
        self.art_steps += self.apply_chain(axis, *chain)

    def art_tokens(self, axis: int) -> None:
        chain = _C.art_columns(self.columns(axis), 4 * self.axes[axis].order)
        self.art_steps += self.apply_chain(axis, *chain)

    def urt_flat(self, axis: int, threshold: float = 0.0) -> None:
        """URT of the indices whose extreme is at least `threshold` times the median."""
        v = self.signed_extremes(axis)
        acted = np.flatnonzero(np.abs(v) >= threshold * np.median(np.abs(v)))
        if len(acted):
            pairs, angles = _C.urt(v[acted], np.where(v[acted] < 0, -1.0, 1.0))
            self.urt_steps += self.apply_chain(axis, acted[pairs].astype(np.int32), angles)


def _hadamard(site: _Site) -> None:
    for axis in site.axes:
        axis.hadamard = True


def paper(
    site: _Site,
    art: bool = True,
    urt: bool = True,
    art_threshold: float = PAPER_ART_THRESHOLD,
    art_share: float = PAPER_ART_SHARE,
    urt_threshold: float = PAPER_URT_THRESHOLD,
) -> None:
    """R1 = R_U1 R_A, R2 = H R_U2: the literal reading. Thresholds are times the median."""
    if art:
        site.art_extremes(0, art_threshold, art_share)
    if urt:
        site.urt_flat(0, urt_threshold)
    site.apply_hadamard(1)
    if urt:
        site.urt_flat(1, urt_threshold)


def arrange(
    site: _Site,
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
    for _ in range(rounds):
        for axis in (0, 1):
            if orders[axis] <= SWEEP_ORDER_MAX:
                site.sweep(axis)
    if art == "last":
        site.art_tokens(0)
        site.art_tokens(1)


def _random(site: _Site) -> None:
    """A random orthogonal factor on each axis, of the seed."""
    for axis, order in enumerate((site.k1, site.k2)):
        if order <= SWEEP_ORDER_MAX:
            site.apply_matrix(axis, _C.random_orthogonal(order, 2 * site.seed + axis))
        else:  # longer axes, of k with a large prime, keep H
            site.apply_hadamard(axis)


def _principal(site: _Site) -> None:
    """H and sweeps in a basis whose leading channels hold the site's energy, after ResQ.

    On the first axis the principal directions of the tokens (eigenvectors of the axis Gram matrix,
    falling eigenvalues) go first and keep 8 bits (Saxena et al., arXiv 2412.14363, section 3); a
    Hadamard and the uniformity sweeps mix them among themselves, and the others among themselves.
    The second axis is as in `arrange`.
    """
    count = _high_count(site.k1, site.k2, site.high_step)
    if count == 0:
        arrange(site, art="no")
        return
    gram = _C.axis_gram(site.statistics.sample, site.k1, site.k2)
    directions = _C.principal_directions(gram)
    parts = ((0, count), (count, site.k1))
    site.normalize(WEIGHT_SHARE)
    mixed = [_C.hadamard_transform(directions[begin:end].T).T for begin, end in parts]
    site.apply_matrix(0, np.concatenate(mixed))
    site.apply_hadamard(1)
    for _ in range(SWEEP_ROUNDS):
        for begin, end in parts:
            site.sweep(0, begin, end)
        if site.k2 <= SWEEP_ORDER_MAX:
            site.sweep(1)
    site.high = count * site.k2


def _high_count(k1: int, k2: int, high_step: int) -> int:
    """Directions of the first axis that keep 8 bits: whole blocks of high_step inputs, or 0."""
    if not high_step:
        return 0
    step = lcm(k2, high_step) // k2
    count = max(1, round(HIGH_SHARE * k1 / step)) * step
    return count if 2 * count <= k1 <= SWEEP_ORDER_MAX else 0


# ---- balance: a factor per channel that folds into what produces the site's input ---------------


def _balanced_rms(s: SiteStatistics) -> NDArray[np.float64]:
    """[k] (rms_x / rms_W)^(1/2): activations and weights get the same rms in each channel.

    It minimises the product of the two sums of squares, hence the error that noise in proportion
    to either's size makes.
    """
    x2, w2 = (_shared(a, s.shared, np.mean) for a in (s.sum2 / max(s.count, 1), s.weight_sum2))
    return _unit_mean(x2, w2, 0.25, 0.25)


def _balanced_peaks(s: SiteStatistics, alpha: float) -> NDArray[np.float64]:
    """[k] max|x|^alpha / max|W|^(1 - alpha): SmoothQuant (arXiv 2211.10438), equation 4."""
    peaks = (np.maximum(np.abs(s.min), np.abs(s.max)), s.weight_max)
    x, w = (_shared(a, s.shared, np.max) for a in peaks)
    return _unit_mean(x, w, alpha, 1 - alpha)


def _shared(values: NDArray[np.float64], shared: tuple[int, int, int], by) -> NDArray[np.float64]:
    """Values that agree where inputs come from one producer."""
    folded = values.reshape(shared)
    return np.broadcast_to(by(folded, axis=1, keepdims=True), shared).reshape(-1)


def _unit_mean(
    x: NDArray[np.float64], w: NDArray[np.float64], x_power: float, w_power: float
) -> NDArray[np.float64]:
    """x^x_power / w^w_power with geometric mean 1; dead channels get 1."""
    live = (x > 0) & (w > 0)
    log = np.zeros_like(x)
    log[live] = x_power * np.log(x[live]) - w_power * np.log(w[live])
    log[live] -= log[live].mean() if live.any() else 0.0
    return np.exp(np.clip(log, -BALANCE_LOG_MAX, BALANCE_LOG_MAX))


# ---- methods ------------------------------------------------------------------------------------


# A method builds the site's axes, or returns a rotation of its own.
Build = Callable[[_Site], BlockRotation | None]


@dataclass(frozen=True)
class _Method:
    """How a method builds a site's axes, and the balance before it at its BALANCED_SITES."""

    build: Build
    balance: Callable[[SiteStatistics], NDArray[np.float64]] | None = None
    high: bool = False  # whether it keeps directions at 8 bits


METHODS: dict[str, _Method] = {
    "none": _Method(lambda site: None),
    "smoothquant": _Method(lambda site: None, lambda s: _balanced_peaks(s, SMOOTHQUANT_ALPHA)),
    "random": _Method(_random),
    "hadamard": _Method(_hadamard),
    "duquant": _Method(
        lambda site: solve_site_duquant(site.statistics, site.seed),
        lambda s: _balanced_peaks(s, DUQUANT_ALPHA),
    ),
    "art": _Method(lambda site: paper(site, urt=False)),
    "urt": _Method(lambda site: paper(site, art=False)),
    "paper": _Method(paper),
    "singlequant": _Method(arrange),
    "balanced": _Method(_principal, _balanced_rms, high=True),
}


def solve_site(
    statistics: SiteStatistics,
    method: str | Build = DEFAULT_METHOD,
    seed: int = 0,
    site: str = "down",
    high_step: int = HIGH_STEP,
) -> SiteRotation | BlockRotation:
    """Transformation of one site from its statistics.

    method: "balanced" (a balance per channel, principal directions at 8 bits, then the arrangement
    of "singlequant"), "singlequant" (the best arrangement of Givens rotations and Hadamard),
    "paper" (the literal reading of the paper), "art" and "urt" (the paper with the other one left
    out), "hadamard" (on both axes), "random" (orthogonal factors, of the seed), "duquant" (arXiv
    2406.01721), "smoothquant" (arXiv 2211.10438) or "none"; or a function that builds the site's
    axes, as experiments do. site: its name, as smoothquant balances some alone. high_step: inputs
    keep 8 bits in blocks of so many; 0: none do. ValueError on another name.
    """
    if not callable(method) and method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    rules = _Method(method) if callable(method) else METHODS[method]
    balance = None
    if rules.balance is not None and site in BALANCED_SITES[method]:
        balance = rules.balance(statistics).astype(np.float32)
        statistics = replace(
            statistics, sample=statistics.sample / balance, weights=statistics.weights * balance
        )
    built = _Site(statistics, seed, high_step)
    found = rules.build(built)
    if found is not None:
        return replace(found, balance=balance)
    return SiteRotation(
        left=built.axes[0].factor(),
        right=built.axes[1].factor(),
        art_steps=built.art_steps,
        urt_steps=built.urt_steps,
        sweep_rotations=built.sweep_rotations,
        balance=balance,
        high=built.high,
    )


def high_step(config: QuantConfig) -> int:
    """Inputs of a block that config's method keeps at 8 bits; 0 where it keeps none."""
    rules = METHODS.get(config.method)
    if rules is None or not rules.high or config.activation_bits != 4:
        return 0
    return config.group_size or HIGH_STEP


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
    """Rotations of one layer's sites."""
    step = HIGH_STEP
    if isinstance(method, QuantConfig):
        step, method, seed = high_step(method), method.method, method.seed
    sites = {
        name: solve_site(site, method, seed, name, step) for name, site in layer.sites.items()
    }
    return LayerRotations(layer.index, sites, layer)
