# SPDX-License-Identifier: Apache-2.0
"""The table of methods: one row each, and the module that implements it, imported when it is used.

This file imports nothing of the package, so that every other file may import it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALL_INPUTS = ("residual", "latent", "attention", "mlp")  # what a site may read: `Site.reads`


@dataclass(frozen=True)
class Method:
    """What the rest of the package must know of a method without importing it.

    The module of a method has these functions:

    build(site, **options): builds the axes of an `axes.Site`, or returns a rotation of its own;
        needed where `rotates` names sites.
    balance(statistics): the balance [k] of a `SiteStatistics`; needed where `balances` names sites.
    align(statistics): the `Alignment` of a `SiteStatistics`, or None; needed where `aligns` names
        sites, as is align_bytes(reads, k): bytes that it adds to the stored rotation.
    online_bytes(k): bytes that the stored rotation of a site with k inputs takes; needed where
        `rotates` names sites.
    prepare(checkpoint, config, windows): the view of the checkpoint whose residual stream is
        rotated in the weights; needed where `residual` is true. With `samples` it takes recorded
        activations, a `stream.StreamSamples`, in place of the windows. With `trains` the view has
        trained weights instead.
    """

    name: str
    summary: str  # one line of the methods table
    module: str | None  # "singlequant.methods.paper"; None where there is nothing to do
    options: Mapping[str, Any] = field(default_factory=dict)  # of build: variants share a module
    rotates: tuple[str, ...] = ALL_INPUTS  # sites that are rotated online, by what they read
    balances: tuple[str, ...] = ()  # sites whose inputs are balanced, by what they read
    aligns: tuple[str, ...] = ()  # sites whose inputs and weights are aligned, by what they read
    residual: bool = False  # whether it rotates the residual stream inside the weights
    samples: bool = False  # whether it finds that rotation from recorded activations
    trains: bool = False  # whether it trains weights and scales
    int8_inputs: bool = False  # whether it keeps some inputs at 8 bits where others get 4
    looks: bool = True  # whether it looks at the inputs or the weights
    blas: bool = False  # whether it multiplies matrices through NumPy's BLAS, or PyTorch's
    extra: str | None = None  # the optional dependency that it needs: "torch"

    @property
    def folds(self) -> str | None:
        """What it folds into the weights, which a packed folder does not tell apart; or None."""
        if self.residual:
            return "rotation of the residual stream"
        if self.trains:
            return "training"
        return "balance" if self.balances else "alignment" if self.aligns else None

    def implementation(self) -> Any:
        """The module that has its functions; imported at the first call."""
        return importlib.import_module(self.module)

    def build(self, site: Any) -> Any:
        """The module's build with this row's options."""
        return self.implementation().build(site, **self.options)

    def online_bytes(self, reads: str, k: int) -> int:
        """Bytes of the stored rotation of a site with k inputs that reads `reads`."""
        found = self.implementation().online_bytes(k) if reads in self.rotates else 0
        if reads in self.aligns:
            found += self.implementation().align_bytes(reads, k)
        return found


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("balanced", "principal directions of the first axis, a quarter of them at 8 bits; H "
               "and 2 uniformity sweeps in the two parts apart, and on the second axis",
               "singlequant.methods.balanced", balances=ALL_INPUTS, int8_inputs=True),
        Method("aligned", "`balanced`, with value heads aligned in the weights of v and o, and "
               "blocks of down's inputs online", "singlequant.methods.balanced",
               balances=ALL_INPUTS, aligns=("attention", "mlp"), int8_inputs=True, blas=True),
        Method("aligned-o", "`aligned`, value heads alone", "singlequant.methods.balanced",
               balances=ALL_INPUTS, aligns=("attention",), int8_inputs=True, blas=True),
        Method("aligned-down", "`aligned`, down's inputs alone", "singlequant.methods.balanced",
               balances=ALL_INPUTS, aligns=("mlp",), int8_inputs=True, blas=True),
        Method("singlequant", "of three, what rounding harms least at the site: H on both axes; H "
               "and 2 uniformity sweeps of each axis in turn; H, token-exact ART on both axes, "
               "and the sweeps", "singlequant.methods.singlequant", {"art": "chosen"}),
        Method("paper", "first axis: ART on the sample's signed extremes (at most 25 % of the "
               "indices), then URT to flat; second axis: H, then URT to flat",
               "singlequant.methods.paper"),
        Method("art", "`paper` without URT", "singlequant.methods.paper", {"urt": False}),
        Method("urt", "`paper` without ART", "singlequant.methods.paper", {"art": False}),
        Method("hadamard", "H on both axes", "singlequant.methods.hadamard", looks=False),
        Method("random", "a random orthogonal matrix on each axis, of the seed",
               "singlequant.methods.random", looks=False),
        Method("quarot", "a randomized H of the residual stream and H of each value head in the "
               "weights; online H", "singlequant.methods.quarot",
               rotates=("latent", "attention", "mlp"), residual=True, blas=True),
        Method("spinquant", "learned rotations of the residual stream and of each value head in "
               "the weights; online H", "singlequant.methods.spinquant", rotates=("mlp",),
               residual=True, extra="torch", blas=True),
        Method("kurtail", "rotations of the residual stream and of each value head in the weights "
               "that have the least kurtosis; online H", "singlequant.methods.kurtail",
               rotates=("mlp",), residual=True, samples=True, blas=True),
        Method("conqur", "rotations of the residual stream and of each value head in the weights "
               "onto the corners of a cube; online H", "singlequant.methods.conqur",
               rotates=("mlp",), residual=True, samples=True, blas=True),
        Method("cat", "symmetric alignment of blocks, then H on both axes",
               "singlequant.methods.cat", aligns=ALL_INPUTS, blas=True),
        Method("wush", "alignment of blocks that makes them diagonal, then H of each block",
               "singlequant.methods.wush", aligns=ALL_INPUTS, blas=True),
        Method("duquant", "block rotations around a permutation", "singlequant.methods.duquant",
               balances=ALL_INPUTS, blas=True),
        Method("smoothquant", "the balance alone", "singlequant.methods.smoothquant",
               rotates=(), balances=("residual",)),
        Method("efficientqat", "weights and scales trained block by block, no rotation",
               "singlequant.methods.efficientqat", rotates=(), trains=True, extra="torch",
               blas=True),
        Method("none", "nothing: plain rounding", None, rotates=(), looks=False),
    )
}

DEFAULT_METHOD = "balanced"


def find_method(name: Any) -> Method:
    """The row of that name. ValueError lists the names."""
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, found {name!r}")
    return METHODS[name]


def methods_table() -> str:
    """The methods as a Markdown table, as docs/rotations.md has it."""
    lines = ["| `--method` | balances inputs of | rotates inputs of | how |", "|---|---|---|---|"]
    for row in METHODS.values():
        name = f"`{row.name}`{' (default)' if row.name == DEFAULT_METHOD else ''}"
        needs = f" (needs {row.extra})" if row.extra else ""
        lines.append(f"| {name} | {_places(row.balances)} | {_places(row.rotates)} "
                     f"| {row.summary}{needs} |")
    return "\n".join(lines)


def _places(reads: tuple[str, ...]) -> str:
    """Sites by what they read, in words."""
    words = {"residual": "q, k, v, gate, up", "latent": "q_b, kv_b", "attention": "o",
             "mlp": "down"}
    return "all linears" if reads == ALL_INPUTS else ", ".join(words[r] for r in reads)
