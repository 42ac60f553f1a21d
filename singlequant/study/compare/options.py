# SPDX-License-Identifier: Apache-2.0
"""What a comparison is asked to do, checked before any work."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from ...config import QuantConfig
from ...methods.registry import METHODS

EQUAL_CLIP = 1.0  # activations are not clipped in rows of equal rounding


def default_methods() -> tuple[str, ...]:
    """Every method that needs no extra, the plain rounding first."""
    return ("none", *(m.name for m in METHODS.values() if m.name != "none" and not m.extra))


@dataclass(frozen=True)
class CompareOptions:
    """Which rows to make, how to evaluate them, and what to keep.

    ValueError names the field that is wrong, what was expected and what was found.
    """

    methods: Sequence[str] | None = None  # None: `default_methods()`
    schemes: Sequence[str] = ("w4a8", "w4a4")
    weights: Sequence[str] = ("rtn",)  # rounding of every method, a row each
    clip: float = EQUAL_CLIP  # of every method's activations
    bits: float = 4.0  # of every method's weights
    group_size: int = 0
    head_bits: int | None = None  # of every row, as in QuantConfig
    embedding_bits: int | None = None
    defaults: bool = True  # a row more per scheme and seed: the recipe's own rounding
    learned: str | Path | None = None  # a file of SpinQuant's rotations, instead of learning them
    calibration: str | Path | None = None  # as for quantize_folder; None: the bundled text
    calibration_tokens: int | None = None  # None: the recipe's own number
    seeds: Sequence[int] = (0,)  # draws of the calibration windows, a row each
    texts: Sequence[str | Path] | None = None  # files to evaluate on; None: the bundled text
    seq_len: int | None = None  # tokens of a window; None: the model's maximum, 2048 at most
    windows: int | None = None  # the first windows of each text; None: all
    tasks: Sequence[str] = ()  # names for lm-evaluation-harness
    task_folder: str | Path | None = None  # of local tasks
    out: str | Path | None = None  # a folder that keeps packed models and finished rows
    rows_file: str | Path | None = None  # keeps finished rows; None: in `out`, if that is given

    def __post_init__(self) -> None:
        if self.task_folder is not None and not self.tasks:
            raise ValueError(f"task_folder: needs tasks, found none with {self.task_folder}")
        if isinstance(self.tasks, str):
            raise ValueError(f"tasks: expected a list of names, found {self.tasks!r}")
        if self.methods is None:
            object.__setattr__(self, "methods", default_methods())
        for name in ("methods", "schemes", "weights", "seeds"):
            values = getattr(self, name)
            if isinstance(values, str) or not len(values):
                raise ValueError(f"{name}: expected a list of at least one, found {values!r}")
        if isinstance(self.texts, (str, Path)):
            object.__setattr__(self, "texts", (self.texts,))
        if self.texts is not None and not self.texts:
            raise ValueError("texts: expected at least one file, found none")
        if self.windows is not None and self.windows < 1:
            raise ValueError(f"windows: expected at least 1, found {self.windows}")
        if self.learned is not None and "spinquant" not in self.methods:
            raise ValueError(f"learned: needs method spinquant, not among the methods; "
                             f"found {self.learned}")
        self.recipes()  # QuantConfig checks the rest

    def recipes(self) -> list[tuple[QuantConfig, bool]]:
        """(config, whether it is the recipe's default) of every row, in the table's order."""
        roundings = dict.fromkeys((*self.weights, *[QuantConfig().weights] * self.defaults))
        tokens = self.calibration_tokens  # of all rows, which share the windows
        if tokens is None:
            tokens = max(QuantConfig(weights=weights).calibration_tokens for weights in roundings)
        common = {"head_bits": self.head_bits, "embedding_bits": self.embedding_bits,
                  "calibration_tokens": tokens}
        rows = []
        for scheme in dict.fromkeys(self.schemes):
            for seed, rounding, method in itertools.product(
                *map(dict.fromkeys, (self.seeds, self.weights, self.methods))
            ):
                config = QuantConfig(scheme=scheme, method=method, weights=rounding, seed=seed,
                                     clip=self.clip, bits=self.bits,
                                     group_size=self.group_size, **common)
                if method == "spinquant" and self.learned is not None:
                    config = replace(config, learned=str(self.learned))
                rows.append((config, False))
            if self.defaults:
                rows += [(QuantConfig(scheme=scheme, seed=seed, **common), True)
                         for seed in dict.fromkeys(self.seeds)]
        return rows


class Changes(TypedDict, total=False):
    """Fields of `CompareOptions` by name, for type checkers."""

    methods: Sequence[str] | None
    schemes: Sequence[str]
    weights: Sequence[str]
    clip: float
    bits: float
    group_size: int
    head_bits: int | None
    embedding_bits: int | None
    defaults: bool
    learned: str | Path | None
    calibration: str | Path | None
    calibration_tokens: int | None
    seeds: Sequence[int]
    texts: Sequence[str | Path] | None
    seq_len: int | None
    windows: int | None
    tasks: Sequence[str]
    task_folder: str | Path | None
    out: str | Path | None
    rows_file: str | Path | None
