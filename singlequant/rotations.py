# SPDX-License-Identifier: Apache-2.0
"""Transformations of a site's inputs: what methods solve and the weights take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _C
from .config import INT8_STEP
from .html import table_html
from .statistics import LayerStatistics

FLOAT16_LARGEST = 65504.0
FLOAT16_LEAST = 2.0**-10  # of a block's largest entry: entries 2^-14 of it are still normal
FACTOR_DENSE_MAX = _C.FACTOR_DENSE_MAX  # larger factors stay chains


@dataclass(frozen=True, eq=False, repr=False)
class Factor:
    """One Kronecker factor as it acts on its axis's vectors: v -> chain(H v)."""

    order: int
    hadamard: bool
    pairs: NDArray[np.int32]  # [steps, 2], in order of application
    angles: NDArray[np.float64]  # [steps] rad

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", frozen(self.pairs, np.int32).reshape(-1, 2))
        object.__setattr__(self, "angles", frozen(self.angles, np.float64).reshape(-1))
        problem = chain_problem(self.order, self.pairs, self.angles)
        if problem:
            raise ValueError(f"factor: {problem}")

    @classmethod
    def identity(cls, order: int) -> Factor:
        """The factor that leaves vectors of that order as they are."""
        return cls(order, False, np.empty((0, 2), np.int32), np.empty(0))

    @property
    def steps(self) -> int:
        """Number of Givens rotations."""
        return len(self.angles)

    @property
    def is_identity(self) -> bool:
        """True without a Hadamard and without a Givens rotation."""
        return not self.hadamard and self.steps == 0

    def matrix(self) -> NDArray[np.float64]:
        """The orthogonal matrix [order, order], v -> matrix @ v."""
        rows = np.eye(self.order)  # row i is e_i: transformed, it is column i of the matrix
        if self.hadamard:
            rows = _C.hadamard_transform(rows)
        if self.steps:
            rows = _C.chain_apply(self.pairs, self.angles, rows)
        return np.ascontiguousarray(rows.T)

    def runtime(self) -> NDArray[np.float32] | tuple[int, bool, Any, Any]:
        """What _C.Rotation takes: a dense float32 matrix up to FACTOR_DENSE_MAX, else the chain."""
        if self.order <= FACTOR_DENSE_MAX:
            return self.matrix().astype(np.float32)
        return self.order, self.hadamard, self.pairs, self.angles

    def __repr__(self) -> str:
        return f"Factor({self.order}{', H' if self.hadamard else ''}, {self.steps} rotations)"


def chain_problem(order: int, pairs: NDArray[Any], angles: NDArray[Any]) -> str | None:
    """What is wrong with a chain of that order, or None. Reads every pair and angle."""
    if order < 1:
        return f"expected an order of at least 1, found {order}"
    if pairs.ndim != 2 or pairs.shape != (angles.size, 2) or angles.ndim != 1:
        return f"expected pairs [steps, 2] and angles [steps], found {pairs.shape}, {angles.shape}"
    if pairs.size and not (pairs.min() >= 0 and pairs.max() < order):
        return f"expected indices from 0 to {order - 1}, found {pairs.min()} to {pairs.max()}"
    if np.any(pairs[:, 0] == pairs[:, 1]):
        return "expected two different indices in each pair"
    if not np.isfinite(angles).all():
        return "expected finite angles"
    return None


@dataclass(frozen=True)
class Step:
    """One operation of a solver, in the order in which it was made."""

    name: str  # "Hadamard", "ART", "URT", "sweep 1", ...
    axis: int  # 0: the first Kronecker axis, 1: the second
    hadamard: bool = False  # the Hadamard of the axis, before any Givens rotation of it
    count: int = 0  # Givens rotations that it added to the axis's chain

    def is_a(self, kind: str) -> bool:
        """Whether the name is `kind`, or `kind` and a number."""
        return self.name == kind or self.name.startswith(f"{kind} ")


@dataclass(frozen=True, eq=False, repr=False)
class Alignment:
    """Invertible blocks in front of a site's rotation: x blockdiag(matrices).

    Weight rows take blockdiag(inverse_t), so that the product stays. folded: the rows of what
    produces x take the blocks (v's, whose heads they are), and inference has nothing to do.
    """

    matrices: NDArray[np.float64]  # [k / b, b, b] M
    inverse_t: NDArray[np.float64]  # [k / b, b, b] M^-T
    folded: bool = False

    def __post_init__(self) -> None:
        for name in ("matrices", "inverse_t"):
            object.__setattr__(self, name, frozen(getattr(self, name), np.float64))
        count, b = (self.matrices.shape + (0, 0))[:2]
        for name in ("matrices", "inverse_t"):
            found = getattr(self, name)
            if found.shape != (count, b, b) or not found.size or not np.isfinite(found).all():
                raise ValueError(f"{name}: expected finite square blocks (k / b, b, b), "
                                 f"found {found.shape}")

    @property
    def k(self) -> int:
        """Inputs of the site's linears."""
        return self.matrices.shape[0] * self.matrices.shape[1]

    def times(self, factor: Factor) -> Alignment:
        """The blocks with v -> factor v behind each, whose order the factor has."""
        turn = factor.matrix().T
        return Alignment(self.matrices @ turn, self.inverse_t @ turn, self.folded)

    def stored(self) -> NDArray[np.float16] | NDArray[np.float32]:
        """The matrices [k / b, b, b] in 16 bits, or in 32 where those have not the range."""
        largest = np.abs(self.matrices).max(axis=(1, 2))
        fits = largest.max() < FLOAT16_LARGEST and largest.min() > FLOAT16_LEAST
        return self.matrices.astype(np.float16 if fits else np.float32)


@dataclass(frozen=True, eq=False, repr=False)
class SiteRotation:
    """The transformation of one site: X [k1, k2] -> left (X / balance) right^T.

    Each factor acts on its axis; the balance, one factor per input, folds into what produces x. An
    alignment comes between the two: x / balance, times its blocks, is what the factors rotate.
    """

    left: Factor  # order k1: the paper's R1 = R_U1 R_A
    right: Factor  # order k2: the transpose of the paper's R2 = H R_U2
    steps: tuple[Step, ...] = ()  # what the solver did, in order; empty where nobody recorded it
    balance: NDArray[np.float32] | None = None  # [k] x / balance, W * balance
    int8_inputs: int = 0  # leading inputs, after rotation, that keep 8 bits where others get 4
    align: Alignment | None = None

    def __post_init__(self) -> None:
        if self.align is not None and self.align.k != self.k:
            raise ValueError(f"align: expected blocks of {self.k} inputs, found {self.align.k}")
        if self.balance is not None:
            object.__setattr__(self, "balance", _checked_balance(self.balance, self.k))
        if not 0 <= self.int8_inputs < self.k or self.int8_inputs % INT8_STEP:
            raise ValueError(f"int8_inputs: expected a multiple of {INT8_STEP} below {self.k}, "
                             f"found {self.int8_inputs}")

    @property
    def k(self) -> int:
        """Inputs of the site's linears."""
        return self.left.order * self.right.order

    @property
    def sizes(self) -> tuple[int, int]:
        """(k1, k2)."""
        return self.left.order, self.right.order

    @property
    def is_identity(self) -> bool:
        """True if nothing is left to do at inference."""
        return self.left.is_identity and self.right.is_identity and not self.online

    @property
    def online(self) -> bool:
        """Whether inference multiplies by the alignment's blocks."""
        return self.align is not None and not self.align.folded

    @cached_property
    def merged(self) -> tuple[Factor, Factor | None, Alignment | None]:
        """(left, right, alignment) with the right factor inside the blocks where these are its
        rows, and None in its place."""
        if self.online and self.align.matrices.shape[1] == self.right.order:
            return self.left, None, self.align.times(self.right)
        return self.left, self.right, self.align

    @cached_property
    def core(self) -> _C.Rotation:
        """What inference does, as the core takes it: without balance and folded alignment."""
        align = self.merged[2]
        return self._core(_C.to_float32(align.stored()) if self.online else None)

    @cached_property
    def of_inputs(self) -> _C.Rotation | None:
        """What the balanced inputs take, folded or not; None for nothing."""
        if self.align is None or self.online:
            return None if self.is_identity else self.core
        return self._core(self.align.matrices.astype(np.float32))

    @cached_property
    def of_weights(self) -> _C.Rotation | None:
        """What the balanced weight rows take; None for nothing."""
        if self.align is None:
            return None if self.is_identity else self.core
        align = self.merged[2]
        if self.online:  # of what is stored, so that its rounding cancels
            inverse_t = np.linalg.inv(align.stored().astype(np.float64)).transpose(0, 2, 1)
        else:
            inverse_t = align.inverse_t
        return self._core(inverse_t.astype(np.float32))

    def _core(self, align: NDArray[np.float32] | None) -> _C.Rotation:
        left, right, _ = self.merged
        return _C.Rotation(self.k, left.runtime(), right and right.runtime(), align)

    def givens_count(self, kind: str) -> int:
        """Givens rotations of the steps of one kind: "ART", "URT" or "sweep"."""
        return sum(step.count for step in self.steps if step.is_a(kind))

    def partials(self) -> Iterator[tuple[str, SiteRotation]]:
        """(name, what stands after it) of the balance and of each recorded step, in order.

        The last one is the rotation itself. Hadamards of both axes in a row are one entry.
        Without recorded steps the one entry is ("final", self).
        """
        factors = [replace(f, hadamard=False, pairs=f.pairs[:0], angles=f.angles[:0])
                   for f in (self.left, self.right)]
        found = []
        plain = replace(self, left=factors[0], right=factors[1])
        if self.balance is not None:
            found.append(("balance", replace(plain, align=None)))
        if self.align is not None:
            found.append(("alignment", plain))
        for number, step in enumerate(self.steps):
            whole = (self.left, self.right)[step.axis]
            end = factors[step.axis].steps + step.count
            factors[step.axis] = replace(
                whole, hadamard=factors[step.axis].hadamard or step.hadamard,
                pairs=whole.pairs[:end], angles=whole.angles[:end])
            after = replace(self, left=factors[0], right=factors[1])
            if step.hadamard and number and self.steps[number - 1].hadamard:
                found[-1] = f"{step.name}, both axes", after
            else:
                found.append((f"{step.name}, axis {step.axis + 1}", after))
        if not self.steps and not (self.left.is_identity and self.right.is_identity):
            return iter([*found, ("final", self)])
        if found:
            found[-1] = found[-1][0], self
        return iter(found)

    def __repr__(self) -> str:
        counts = "".join(f", {kind} {self.givens_count(kind)}" for kind in ("ART", "URT", "sweep"))
        return (
            f"SiteRotation({self.left.order}x{self.right.order}{counts}"
            f"{', balanced' if self.balance is not None else ''}"
            f"{', aligned' if self.align is not None else ''}"
            f"{f', {self.int8_inputs} at 8 bits' if self.int8_inputs else ''})"
        )


def permutation_problem(permutation: NDArray[Any]) -> str | None:
    """What keeps a vector of integers from being a permutation, or None."""
    if np.array_equal(np.sort(permutation), np.arange(len(permutation))):
        return None
    return f"expected each of 0 to {len(permutation) - 1} once, found others or one twice"


@dataclass(frozen=True, eq=False, repr=False)
class BlockRotation:
    """x [k] -> x blockdiag(first), permuted, times blockdiag(second): DuQuant's form."""

    first: NDArray[np.float32]  # [k / b, b, b]
    permutation: NDArray[np.int32]  # [k]: channel permutation[i] goes to place i
    second: NDArray[np.float32]  # [k / b, b, b]
    balance: NDArray[np.float32] | None = None  # [k] x / balance, W * balance, as in SiteRotation

    int8_inputs = 0  # all inputs have one width
    align = None  # blocks are orthogonal

    def __post_init__(self) -> None:
        for name, dtype in (("first", np.float32), ("permutation", np.int32),
                            ("second", np.float32)):
            object.__setattr__(self, name, frozen(getattr(self, name), dtype))
        count, b = (self.first.shape + (0, 0))[:2]
        for name, shape in (("first", (count, b, b)), ("second", (count, b, b)),
                            ("permutation", (count * b,))):
            found = getattr(self, name).shape
            if found != shape or not count * b:
                raise ValueError(f"{name}: expected square blocks (k / b, b, b) twice and a "
                                 f"permutation (k,), found {found}")
        problem = permutation_problem(self.permutation)
        if problem:
            raise ValueError(f"permutation: {problem}")
        if self.balance is not None:
            object.__setattr__(self, "balance", _checked_balance(self.balance, self.k))

    @property
    def k(self) -> int:
        """Inputs of the site's linears."""
        return len(self.permutation)

    @property
    def sizes(self) -> tuple[int, int]:
        """(k / b, b)."""
        return self.first.shape[0], self.first.shape[1]

    @cached_property
    def is_identity(self) -> bool:
        """True if blocks and permutation leave everything as it is."""
        eye = np.eye(self.sizes[1], dtype=np.float32)
        unmoved = np.array_equal(self.permutation, np.arange(self.k))
        return unmoved and bool((self.first == eye).all() and (self.second == eye).all())

    @cached_property
    def core(self) -> _C.Rotation:
        """The rotation as the core takes it, without the balance."""
        return _C.Rotation.blocks(self.first, self.permutation, self.second)

    @property
    def of_inputs(self) -> _C.Rotation | None:
        """What the balanced inputs take; None for nothing."""
        return None if self.is_identity else self.core

    @property
    def of_weights(self) -> _C.Rotation | None:
        """What the balanced weight rows take, as the inputs: blocks are orthogonal."""
        return self.of_inputs

    def givens_count(self, kind: str) -> int:
        """0: blocks are matrices, without Givens rotations."""
        return 0

    def partials(self) -> Iterator[tuple[str, BlockRotation]]:
        """(name, what stands after it) of each step in order; the last one is the rotation."""
        eye = np.broadcast_to(np.eye(self.sizes[1], dtype=np.float32), self.first.shape)
        unmoved = np.arange(self.k, dtype=np.int32)
        if self.balance is not None:
            yield "balance", replace(self, first=eye, permutation=unmoved, second=eye)
        yield "first blocks", replace(self, permutation=unmoved, second=eye)
        yield "permutation", replace(self, second=eye)
        yield "second blocks", self

    def __repr__(self) -> str:
        return f"BlockRotation({self.sizes[0]} blocks of {self.sizes[1]})"


@dataclass(frozen=True)
class LayerRotations:
    """The rotations of one layer by site; a site without a rotation is absent."""

    layer: int
    sites: Mapping[str, SiteRotation | BlockRotation]
    statistics: LayerStatistics | None = None  # what they were solved from, for weights "gptq"

    def _repr_html_(self) -> str:
        columns = [["site", *self.sites], ["rotation", *map(repr, self.sites.values())]]
        return table_html(f"Layer {self.layer}", columns, left=2)


def _checked_balance(balance: Any, k: int) -> NDArray[np.float32]:
    """The balance, frozen. ValueError unless it has k positive finite numbers."""
    balance = frozen(balance, np.float32)
    if balance.shape != (k,) or not (np.isfinite(balance) & (balance > 0)).all():
        raise ValueError(
            f"balance: expected {k} positive numbers, found shape {balance.shape}, "
            f"least {balance.min(initial=np.inf):g}"
        )
    return balance


def frozen(array: Any, dtype: Any) -> NDArray[Any]:
    """A read-only contiguous array of dtype; a copy unless it is one already."""
    array = np.asarray(array)
    if array.dtype != dtype or array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, dtype=dtype, order="C")
        array.flags.writeable = False
    return array


def poor_factors(sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """By site, (k1, k2) of the sites whose k has no factors k1 * k2 of at most FACTOR_DENSE_MAX.

    sizes: k by site. The longer axis of such a site is a chain of rotations of two channels each:
    its own Hadamard is no fast one, it takes more time, and sweeps leave it out.
    """
    factors = {name: _C.factor_sizes(k) for name, k in sizes.items()}
    return {name: pair for name, pair in factors.items() if max(pair) > FACTOR_DENSE_MAX}


def factors_text(factors: Mapping[str, tuple[int, int]]) -> str:
    """"down (1009 = 1009 x 1)" for each site; the experts of a layer count as one."""
    shown = {f"{name.partition('.')[0]} ({k1 * k2} = {k1} x {k2})": None
             for name, (k1, k2) in factors.items()}
    return ", ".join(shown)
