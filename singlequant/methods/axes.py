# SPDX-License-Identifier: Apache-2.0
"""The construction of a site's two factors: what methods build with.

A site's input x [k] is reshaped to X [k1, k2]; rotated, it is L X R^T with the factors L and R of
`SiteRotation` (the paper's R1 = L and R2 = R^T). All angles follow from statistics in closed form.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..config import INT8_STEP
from ..rotations import FACTOR_DENSE_MAX, Factor, SiteRotation, Step
from ..statistics import SiteStatistics

SWEEP_ROUNDS = 2  # alternations of the two axes
SWEEP_ELEMENTS, SWEEP_TOKENS_MIN = 1 << 20, 128  # a sweep's sample: wide sites need fewer tokens
WEIGHT_SHARE = 1.0  # of the weight rows in a sweep's sum of fourth powers, the tokens' being 1
SWEEP_ORDER_MAX = 512  # a sweep has n (n - 1) / 2 rotations: longer axes keep H alone
TENSOR_HEADER_BYTES = 190  # a stored tensor's header entry and its line of the index, about

Sample = NDArray[np.float64]  # [tokens, k1, k2]


def factor_bytes(k: int) -> int:
    """Bytes of a site's two stored factors; a long one is a chain of two rotations per entry."""
    return sum(
        TENSOR_HEADER_BYTES + (4 * order**2 if order <= FACTOR_DENSE_MAX else 16 * 2 * order)
        for order in _C.factor_sizes(k)
    )


class Axis:
    """A factor under construction."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.hadamard = False
        self.pairs: list[NDArray[np.int32]] = []
        self.angles: list[NDArray[np.float64]] = []

    def factor(self) -> Factor:
        """The factor as it stands."""
        empty = (np.zeros((0, 2), np.int32), np.zeros(0))
        return Factor(
            self.order,
            self.hadamard,
            np.concatenate([empty[0], *self.pairs]),
            np.concatenate([empty[1], *self.angles]),
        )


class Site:
    """Both axes of one site and its sample, rotated as the axes grow; every step is recorded.

    int8_step: inputs keep 8 bits in blocks of so many; 0: none do. int8_inputs: how many do, which
    the method sets. An axis takes its Hadamard before its first Givens rotation.
    """

    def __init__(
        self, statistics: SiteStatistics, seed: int = 0, int8_step: int = INT8_STEP
    ) -> None:
        self.k1, self.k2 = statistics.k1, statistics.k2
        self.seed, self.int8_step = seed, int8_step
        self.axes = (Axis(self.k1), Axis(self.k2))
        self.statistics = statistics
        self.steps: list[Step] = []
        self.int8_inputs = 0

    def rotation(self, balance: NDArray[np.float32] | None = None) -> SiteRotation:
        """What was built, behind that balance."""
        left, right = (axis.factor() for axis in self.axes)
        return SiteRotation(left, right, tuple(self.steps), balance, self.int8_inputs)

    # the sample

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
        """Put columns [n, rows] of one axis back into the sample."""
        tokens = len(self.sample)
        shape = (self.k1, tokens, self.k2) if axis == 0 else (self.k2, tokens, self.k1)
        self.sample = np.moveaxis(columns.reshape(shape), 0, axis + 1)

    def signed_extremes(self, axis: int) -> NDArray[np.float64]:
        """[n] the entry of largest absolute value of each index of an axis."""
        columns = self.columns(axis)
        peak = np.argmax(np.abs(columns), axis=1)
        return columns[np.arange(len(columns)), peak]

    # steps

    def record(self, name: str, axis: int, count: int) -> None:
        """Note Givens rotations of one axis; those of one name and axis in a row are one step."""
        last = self.steps[-1] if self.steps else None
        if last is not None and (last.name, last.axis) == (name, axis):
            self.steps[-1] = Step(name, axis, count=last.count + count)
        elif count:
            self.steps.append(Step(name, axis, count=count))

    def set_hadamard(self, axis: int) -> None:
        """A Hadamard on one axis, without rotating the sample: for methods that do not look."""
        self.axes[axis].hadamard = True
        self.steps.append(Step("Hadamard", axis, hadamard=True))

    def apply_hadamard(self, axis: int) -> None:
        """A Hadamard on one axis."""
        self.set_hadamard(axis)
        self.set_columns(axis, _C.hadamard_transform(self.columns(axis).T).T)

    def apply_chain(
        self, name: str, axis: int, pairs: NDArray[np.int32], angles: NDArray[np.float64]
    ) -> None:
        """Givens rotations of one axis, in order, as a step of that name."""
        self.set_columns(axis, _C.chain_apply(pairs, angles, self.columns(axis).T).T)
        self._append(name, axis, pairs, angles)

    def _append(self, name: str, axis: int, pairs: NDArray, angles: NDArray) -> None:
        self.axes[axis].pairs.append(pairs)
        self.axes[axis].angles.append(angles)
        self.record(name, axis, len(angles))

    def apply_matrix(self, name: str, axis: int, matrix: NDArray[np.float64]) -> None:
        """An orthogonal matrix as a chain of Givens rotations, a step of that name."""
        self.apply_chain(name, axis, *_C.chain_from_matrix(matrix))

    def sweep(
        self, axis: int, begin: int = 0, end: int | None = None, name: str = "sweep"
    ) -> None:
        """One uniformity sweep of an axis's indices begin .. end - 1 (all of them)."""
        columns = self.columns(axis)
        pairs, angles, columns[begin:end] = _C.uniformity_sweep(columns[begin:end], 1)
        self.set_columns(axis, columns)
        self._append(name, axis, pairs + np.int32(begin), angles)

    def art_extremes(self, axis: int, threshold: float, share: float) -> None:
        """ART on the signed extremes above threshold times the median, at most that share."""
        steps = max(1, int(share * self.axes[axis].order))
        chain = _C.art_extremes(self.signed_extremes(axis), threshold, steps)
        self.apply_chain("ART", axis, *chain)

    def art_tokens(self, axis: int) -> None:
        """Token-exact ART: each rotation is of the token that has the largest entry."""
        chain = _C.art_columns(self.columns(axis), 4 * self.axes[axis].order)
        self.apply_chain("ART", axis, *chain)

    def urt_flat(self, axis: int, threshold: float = 0.0) -> None:
        """URT of the indices whose extreme is at least `threshold` times the median."""
        v = self.signed_extremes(axis)
        acted = np.flatnonzero(np.abs(v) >= threshold * np.median(np.abs(v)))
        if len(acted):
            pairs, angles = _C.urt(v[acted], np.where(v[acted] < 0, -1.0, 1.0))
            self.apply_chain("URT", axis, acted[pairs].astype(np.int32), angles)


def sweep_name(number: int, rounds: int) -> str:
    """The step's name of sweep `number` (from 0) among so many."""
    return f"sweep {number + 1}" if rounds > 1 else "sweep"
