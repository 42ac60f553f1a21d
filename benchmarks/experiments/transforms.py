# SPDX-License-Identifier: Apache-2.0
"""What may happen to a site's inputs before they are rounded: balances, Kronecker factors.

A *site* is the linears that share an input. A `Transform` takes its inputs and, the inverse way,
its weights. A `Solver` makes the transform of a site from its statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singlequant import _C
from singlequant.config import INT8_STEP
from singlequant.methods import axes as method_axes
from singlequant.methods.balance import rms_balance
from singlequant.methods.solve import solve_site
from singlequant.rotations import FACTOR_DENSE_MAX, SiteRotation
from singlequant.statistics import SiteStatistics

from .rounding import Float32


def kronecker(x: Float32, left: Float32, right: Float32) -> Float32:
    """Rows x [m, k1 k2] as matrices X [k1, k2] -> left X right^T; any square factors."""
    m, k = x.shape
    y = x.reshape(m, len(left), len(right)) @ right.T
    return np.ascontiguousarray(np.matmul(left, y).reshape(m, k), np.float32)


@dataclass(frozen=True, eq=False)
class Transform:
    """X [k1, k2] -> left (X / balance) right^T; a weight's rows go the inverse transposed way.

    left and right need not be orthogonal: left_w and right_w are their inverse transposes.
    """

    balance: Float32  # [k]
    left: Float32  # [k1, k1]
    right: Float32  # [k2, k2]
    left_w: Float32
    right_w: Float32
    int8_inputs: int = 0  # leading inputs, after the transformation, that keep 8 bits

    def inputs(self, x: Float32) -> Float32:
        """Tokens x [m, k] as they meet the quantizer."""
        return kronecker(x / self.balance, self.left, self.right)

    def weights(self, w: Float32) -> Float32:
        """Weights w [n, k] as they are rounded."""
        return kronecker(w * self.balance, self.left_w, self.right_w)

    @staticmethod
    def of(rotation: SiteRotation, axes: AxisBalance | None = None) -> Transform:
        """A rotation of the package, behind a balance of whole axes where there is one.

        ValueError for a rotation that is no Kronecker product, or too large to be kept dense.
        """
        if not isinstance(rotation, SiteRotation) or max(rotation.sizes) > FACTOR_DENSE_MAX:
            raise ValueError(f"rotation: expected Kronecker factors of order {FACTOR_DENSE_MAX} "
                             f"at most, found {rotation!r}")
        left, right = rotation.left.matrix(), rotation.right.matrix()
        balance = np.ones(rotation.k) if rotation.balance is None else rotation.balance
        a = axes or AxisBalance(*(np.eye(n) for n in (*rotation.sizes, *rotation.sizes)))
        sides = (left @ a.left, right @ a.right, left @ a.left_w, right @ a.right_w)
        return Transform(np.asarray(balance, np.float32),
                         *(np.ascontiguousarray(s, np.float32) for s in sides),
                         rotation.int8_inputs)


@dataclass(frozen=True, eq=False)
class AxisBalance:
    """A matrix per axis for inputs, and its inverse transpose for weights."""

    left: NDArray[np.float64]
    right: NDArray[np.float64]
    left_w: NDArray[np.float64]
    right_w: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Site:
    """What is known of one site: its statistics with inputs, its weights, held-out inputs."""

    layer: int
    name: str
    statistics: SiteStatistics
    weights: tuple[Float32, ...]  # [n, k] each
    biases: tuple[Float32 | None, ...]
    heldout: Float32  # [tokens, k]

    @cached_property
    def outputs(self) -> list[Float32]:
        """The original's outputs, without bias, for the held-out inputs: [tokens, n] each."""
        return [_C.linear_dense(self.heldout, w) for w in self.weights]


Solver = Callable[[Site], Transform]


def named(method: str) -> Solver:
    """The transformation of one of the package's methods."""
    def solve(site: Site) -> Transform:
        return Transform.of(solve_site(site.statistics, method))

    return solve


def balance_of(site: Site, power: float) -> Float32:
    """[k] (rms_x / rms_W)^power, geometric mean 1; 0.5 is method `balanced`'s."""
    half = rms_balance(site.statistics)
    return (half ** (2 * power)).astype(np.float32)


def built(
    build: Callable[[Any], None],
    power: float = 0.0,
    axes: Callable[[SiteStatistics, Float32, Float32], AxisBalance] | None = None,
) -> Solver:
    """`build` of the solver's axes, behind a balance per channel and one per axis.

    axes(statistics, inputs, weights) gets both after the balance per channel.
    """

    def solve(site: Site) -> Transform:
        statistics, found = site.statistics, None
        balance = balance_of(site, power)
        if power:
            statistics = replace(statistics, sample=statistics.sample / balance,
                                 weights=statistics.weights * balance)
        if axes is not None:
            found = axes(statistics, site.statistics.inputs / balance,
                         np.concatenate(site.weights) * balance)
            sides = [np.ascontiguousarray(a, np.float32)
                     for a in (found.left, found.right, found.left_w, found.right_w)]
            statistics = replace(statistics, sample=kronecker(statistics.sample, *sides[:2]),
                                 weights=kronecker(statistics.weights, *sides[2:]))
        rotation = solve_site(statistics, build)
        return Transform.of(replace(rotation, balance=balance), found)

    return solve


def int8_directions(k1: int, k2: int, share: float) -> int:
    """Directions of the first axis in so large a block of 8 bits: whole ones of INT8_STEP inputs.

    ValueError when there is no such block in the first half.
    """
    step = int(np.lcm(k2, INT8_STEP)) // k2
    count = max(1, round(share * k1 / step)) * step
    if 2 * count > k1:
        raise ValueError(f"share: expected room for {count} of {k1} directions in the first half")
    return count


def principal(share: float, rounds: int = method_axes.SWEEP_ROUNDS) -> Callable[[Any], None]:
    """Build of method `balanced` with another share of the directions at 8 bits."""

    def build(site: Any) -> None:
        count = int8_directions(site.k1, site.k2, share)
        gram = _C.axis_gram(site.statistics.sample, site.k1, site.k2)
        directions = _C.principal_directions(gram)
        parts = ((0, count), (count, site.k1))
        site.normalize(method_axes.WEIGHT_SHARE)
        mixed = [_C.hadamard_transform(directions[a:b].T).T for a, b in parts]
        site.apply_matrix("principal directions", 0, np.concatenate(mixed))
        site.apply_hadamard(1)
        for _ in range(rounds):
            for part in parts:
                site.sweep(0, *part)
            site.sweep(1)
        site.int8_inputs = count * site.k2

    return build
