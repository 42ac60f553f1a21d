# SPDX-License-Identifier: Apache-2.0
"""Which closed-form transformation of a site's inputs is best, with range and rounding fixed.

    python -m benchmarks.experiments.closed_forms [MODEL] [--text FILE] [--calibration FILE]
                     [--windows N] [--seq-len N] [--only PATTERN] [--out DIR] [--quick]

Every transformation under two roundings: to nearest with clip 1, and GPTQ with clip 0.8. Columns:
kl (nats per token from the original), top1 (share of equal first choices), ratio (kl over that of
Hadamard, rounding to nearest, clip 1), peak (mean of (max / rms)^2 of the inputs that get 4 bits)
and output_error (of the linears), both on held-out tokens of the original, bits (of the
activations, mean over inputs) and products_8bit.

Beside the package's methods: a balance per channel of every power; a balance per Kronecker axis;
URT and ART before and after the Hadamard; the sweeps' number, order, sample and weight rows;
principal directions at 8 bits; and 4 or 8 bits per site under a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singlequant import _C
from singlequant.methods import hadamard, singlequant
from singlequant.methods.axes import SWEEP_ROUNDS
from singlequant.statistics import SiteStatistics

from . import recipes as table, simulation
from .rounding import Range
from .simulation import Experiment, Key, Ranges, Recipe, Transformed
from .transforms import AxisBalance, Solver, built, kronecker, named, principal

NAME, TITLE = "closed_forms", "Closed-form transformations"
ROUNDINGS = {"rtn": Range(1.0), "gptq": Range(0.8)}
AXIS_DAMPING = 1e-4  # share of the mean eigenvalue that is added to an axis's Gram matrices
AXIS_ROUNDS = 2  # alternations: one axis's balance changes the other's Gram matrices
TOKEN_BUDGETS = (64, 128, 256, 512, 1024, 2048)
Matrix = NDArray[np.float64]


# ---- a balance per axis -------------------------------------------------------------------------


def axis_balance(
    statistics: SiteStatistics, x: NDArray[np.float32], w: NDArray[np.float32]
) -> AxisBalance:
    """The matrix form of the balance per channel: equal Gram matrices of inputs and weights.

    A step is S = (C_x^-1 # C_w)^1/2, # the geometric mean, of one axis's Gram matrices of inputs
    and weights: then S C_x S = S^-1 C_w S^-1. Axes take turns. x [m, k], w [n, k].
    """
    a = [np.eye(statistics.k1), np.eye(statistics.k2)]
    inverse = [np.eye(statistics.k1), np.eye(statistics.k2)]
    for _ in range(AXIS_ROUNDS):
        for axis in (0, 1):
            c_x, c_w = (_axis_gram(rows, sides, axis) for rows, sides in ((x, a), (w, inverse)))
            step, back = _roots(_geometric_mean(np.linalg.inv(c_x), c_w))
            a[axis], inverse[axis] = step @ a[axis], back @ inverse[axis]
    # a product of symmetric steps is no longer symmetric: weights get the inverse transpose
    return AxisBalance(*a, *inverse)


def _axis_gram(rows: NDArray[np.float32], sides: list[Matrix], axis: int) -> Matrix:
    """Damped Gram matrix of an axis, mean eigenvalue 1, of rows [m, k] transformed by sides."""
    left, right = (np.ascontiguousarray(s, np.float32) for s in sides)
    rotated = kronecker(rows, left, right).reshape(-1, len(left), len(right))
    if axis == 0:
        rotated = np.ascontiguousarray(rotated.transpose(0, 2, 1))
    n = rotated.shape[2]
    gram = _C.gram(rotated.reshape(-1, n)).astype(np.float64)
    return gram * (n / np.trace(gram)) + AXIS_DAMPING * np.eye(n)


def _roots(matrix: Matrix) -> tuple[Matrix, Matrix]:
    """The square root of a symmetric positive definite matrix, and its inverse."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    root = np.sqrt(values)
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _geometric_mean(a: Matrix, b: Matrix) -> Matrix:
    """A # B = A^1/2 (A^-1/2 B A^-1/2)^1/2 A^1/2, the M with M A^-1 M = B."""
    root, inverse = _roots(a)
    return root @ _roots(inverse @ b @ inverse)[0] @ root


# ---- builds of both axes: functions of an `axes.Site`, as `solve_site` takes them --------------


def urt_principal(site: Any, before: bool) -> None:
    """URT that takes each axis's principal direction to a flat one, before or after a Hadamard."""
    site.normalize(0.0)
    if not before:
        _hadamard_first(site)
    for axis in (0, 1):
        columns = site.columns(axis)
        direction = _C.principal_directions(columns @ columns.T)[0]
        chain = _C.urt(direction, np.where(direction < 0, -1.0, 1.0))
        site.apply_chain("URT", axis, *chain)
    if before:
        _hadamard_last(site)


def art_tokens(site: Any, before: bool) -> None:
    """Token-exact ART of both axes, before or after a Hadamard."""
    site.normalize(0.0)
    if not before:
        _hadamard_first(site)
    site.art_tokens(0)
    site.art_tokens(1)
    if before:
        _hadamard_last(site)


def _hadamard_first(site: Any) -> None:
    site.apply_hadamard(0)
    site.apply_hadamard(1)


def _hadamard_last(site: Any) -> None:
    """A factor's own Hadamard comes first: behind a chain it is a chain itself."""
    for axis, order in enumerate((site.k1, site.k2)):
        site.apply_matrix("Hadamard", axis, _C.hadamard_matrix(order))


def sweeps(
    site: Any, order: tuple[int, int] = (0, 1), tokens: int | None = None, share: float = 1.0
) -> None:
    """Hadamard and two rounds of sweeps: axes in that order, of so many tokens.

    share: of the weight rows in the sum of fourth powers, the tokens' being 1. tokens None: as
    many as method `singlequant` takes.
    """
    if tokens is None:
        site.normalize(share)
    else:
        inputs = site.statistics.inputs[:: -(-len(site.statistics.inputs) // tokens)]
        rows = site.statistics.weights
        parts = [_unit_rms(inputs)]
        if share:
            parts.append(_unit_rms(rows) * (share * len(inputs) / len(rows)) ** 0.25)
        site.sample = np.concatenate(parts).reshape(-1, site.k1, site.k2)
    _hadamard_first(site)
    for _ in range(SWEEP_ROUNDS):
        for axis in order:
            site.sweep(axis)


def _unit_rms(x: NDArray[np.float32]) -> Matrix:
    """Rows of x over their root mean squares."""
    x = x.astype(np.float64)
    rms = np.sqrt(np.mean(x**2, axis=1, keepdims=True))
    return x / np.where(rms > 0, rms, 1.0)


# ---- bits per site ------------------------------------------------------------------------------


def predicted_errors(found: Transformed, clip: float) -> dict[Key, float]:
    """Relative output error that 4-bit activations make at each site, in closed form.

    Rounding noise of variance step^2 / 12 in each input, independent of the weights, makes
    step^2 / 12 |W|_F^2 per token, step = clip * max|x| / 7; over |x W^T|^2, on the calibration
    sample.
    """
    errors = {}
    for key, site in found.experiment.sites.items():
        y = found.transforms[key].inputs(site.statistics.sample)
        weights = np.concatenate(found.float_weights(key))
        noise = np.mean((clip * np.abs(y).max(axis=1) / 7) ** 2) / 12 * np.sum(weights**2)
        errors[key] = float(noise / np.mean(np.sum(_C.linear_dense(y, weights) ** 2, axis=1)))
    return errors


def baq_bits(losses: NDArray[np.float64], shares: NDArray[np.float64], mean: float) -> NDArray:
    """Bits of each site that make the marginal loss per bit equal, after BAQ (arXiv 2506.05664).

    Loss of site i at b bits: losses[i] * 4^(4 - b), losses[i] being that at 4. Its derivative over
    the cost shares[i] of a bit is the same everywhere when b_i = c + log2(losses_i / shares_i) / 2,
    where the constant makes the mean over inputs, sum(shares b), what was asked.
    """
    bits = np.log2(losses / shares) / 2
    return mean + bits - np.sum(shares * bits) / np.sum(shares)


def two_levels(budget: float, clip: float, weighted: bool) -> Callable[[Transformed], Mapping]:
    """4 or 8 bits for each site, budget bits on average over all inputs at most.

    Sites get 8 bits in the order of `baq_bits` while they fit; of two levels those are the sites
    with the largest loss removed per bit. weighted: a site's loss is its predicted relative error
    times its share of the inputs; otherwise all sites' errors count alike, so short ones win.
    """

    def allocate(found: Transformed) -> Mapping[Key, Range]:
        errors = predicted_errors(found, clip)
        keys = list(errors)
        k = np.array([found.experiment.sites[key].heldout.shape[1] for key in keys])
        shares = k / k.sum()
        losses = np.array([errors[key] for key in keys]) * (shares if weighted else 1)
        order = np.argsort(-baq_bits(losses, shares, budget), kind="stable")
        ranges, used = dict.fromkeys(keys, Range(clip)), 4.0
        for i in order:
            if used + 4 * shares[i] <= budget + 1e-9:
                used += 4 * shares[i]
                ranges[keys[i]] = Range(bits=8)
        return ranges

    return allocate


# ---- the table ----------------------------------------------------------------------------------


def solvers() -> dict[str, Solver]:
    """Every transformation by name."""
    arrange, balanced = singlequant.build, 0.5
    mixed = hadamard.build
    found = {"hadamard": named("hadamard"), "singlequant": named("singlequant")}
    for power in (0.25, 0.5, 0.75, 1.0):
        found[f"balance {power:g}, H"] = built(mixed, power)
    found["axis balance, H"] = built(mixed, axes=axis_balance)
    found["balance, axis balance, H"] = built(mixed, balanced, axis_balance)
    found["balance, axis balance, H, 2 sweeps"] = built(arrange, balanced, axis_balance)
    found["balance, H, 2 sweeps"] = built(arrange, balanced)
    for rounds in (1, 4):
        found[f"balance, H, {rounds} sweep{'s' * (rounds > 1)}"] = built(
            partial(arrange, rounds=rounds), balanced)
    found["balance, H, 2 sweeps, axis 1 first"] = built(partial(sweeps, order=(1, 0)), balanced)
    for tokens in TOKEN_BUDGETS:
        found[f"balance, H, 2 sweeps, {tokens} tokens"] = built(
            partial(sweeps, tokens=tokens), balanced)
    for share in (0.0, 0.5, 2.0):  # 1 is the row above without a word on weights
        found[f"balance, H, 2 sweeps, weights {share:g}"] = built(
            partial(arrange, weight_share=share), balanced)
    for before in (True, False):
        place = "{}, H" if before else "H, {}"
        found["balance, " + place.format("URT")] = built(
            partial(urt_principal, before=before), balanced)
        found["balance, " + place.format("ART")] = built(
            partial(art_tokens, before=before), balanced)
    for name, share in (("1/16", 1 / 16), ("1/8", 1 / 8), ("1/4", 1 / 4)):
        found[f"balance, {name} at 8 bits, 2 sweeps"] = built(principal(share), balanced)
    found["balance, axis balance, 1/8 at 8 bits, 2 sweeps"] = built(
        principal(1 / 8), balanced, axis_balance)
    return found


def allocations(clip: float) -> dict[str, Ranges]:
    """4 or 8 bits per site; 4.5 is what a block of 1/8 at 8 bits has."""
    return {
        f"{budget:g} bits, {'errors by inputs' if weighted else 'errors alike'}":
            two_levels(budget, clip, weighted)
        for budget in (4.25, 4.5, 5.0) for weighted in (True, False)
        if weighted or budget == 4.5
    }


def recipes() -> list[Recipe]:
    """All rows, those of one transformation together."""
    rows = []
    for name, solver in solvers().items():
        for rounding, r in ROUNDINGS.items():
            rows.append(Recipe(f"{name}, {rounding}", name, solver, rounding, r))
            if name == "balance, H, 2 sweeps":
                rows += [Recipe(f"{name}, {of}, {rounding}", name, solver, rounding, ranges)
                         for of, ranges in allocations(r.clip).items()]
    return rows


def measure(experiment: Experiment, recipe: Recipe) -> dict[str, Any]:
    """What a row holds beside its divergence."""
    cost = simulation.cost(experiment, recipe)
    return {**simulation.site_measures(experiment, recipe), "bits": cost["bits"],
            "products_8bit": cost["products_8bit"]}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    table.main(NAME, TITLE, __doc__, recipes, measure, argv)


if __name__ == "__main__":
    main()
