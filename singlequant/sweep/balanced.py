# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with a balance of every site inside its weights: input for other quantizers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.views import View
from ..config import QuantConfig
from ..methods.balance import block_balance
from ..rotations import Factor, LayerRotations, SiteRotation
from ..statistics import LayerStatistics, SiteStatistics
from ..tensors import TensorInfo
from ..weights import LayerWeights
from .calibrate import calibrate
from .layer import folded_layer
from .texts import calibration_windows

CALIBRATION_TOKENS = 4096  # mean squares of the inputs need few


@dataclass(frozen=True, eq=False, repr=False)
class BalancedCheckpoint(View):
    """An unquantized Checkpoint seen through balances of its sites, and nothing else.

    A site's inputs are divided by its balance in what produces them, a norm or the rows of a
    linear, and its linears' columns are multiplied by it. It takes a Checkpoint's place as the
    other views do. Norms and linears are float32, computed when they are read; all else is the
    source's. ValueError when the checkpoint is packed.
    """

    source: Any  # the Checkpoint
    balances: tuple[LayerRotations, ...]  # of each layer, with nothing but balances

    def __post_init__(self) -> None:
        self.source.require_unquantized()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Type and size of the tensors by name; those of the layers are float32."""
        outer = self.source.outer
        return self._infos({name: "F32" for name, _ in self.spec.tensors() if name not in outer})

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the source's fingerprint and the balances."""
        digest = hashlib.sha256(self.source.fingerprint.encode() + b"balances")
        for layer in self.balances:
            for name, rotation in layer.sites.items():
                digest.update(f"{layer.layer} {name}".encode())
                digest.update(rotation.balance.tobytes())
        return digest.hexdigest()

    def _layer(self, i: int) -> LayerWeights:
        return folded_layer(self.source, self.balances[i])

    def __repr__(self) -> str:
        return f"BalancedCheckpoint({self.source!r})"


def balanced_checkpoint(
    checkpoint: Any, text: str | Path | None = None, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> BalancedCheckpoint:
    """The checkpoint with the balance of `block_balance` at every site that can take one.

    text, seed: of the calibration windows, as for `calibration_windows`.
    """
    layers = statistics_of(checkpoint, text, seed, progress)
    return BalancedCheckpoint(checkpoint, tuple(map(balances_of, layers)))


def statistics_of(
    checkpoint: Any, text: str | Path | None = None, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[LayerStatistics]:
    """What the balances are computed from, layer by layer."""
    config = QuantConfig(calibration_tokens=CALIBRATION_TOKENS, seed=seed)
    windows = calibration_windows(checkpoint, config, text)
    return calibrate(checkpoint, windows, 1, progress, keep_inputs=False,
                     bits=config.calibration_bits)


def balances_of(
    statistics: LayerStatistics,
    balance: Callable[[SiteStatistics], NDArray[np.float64] | None] = block_balance,
) -> LayerRotations:
    """The balances of a layer's sites, where one is found and something can take it."""
    found = {name: balance(site) for name, site in statistics.sites.items() if site.foldable}
    return LayerRotations(statistics.index, {
        name: SiteRotation(Factor.identity(site.k1), Factor.identity(site.k2),
                           balance=found[name].astype(np.float32))
        for name, site in statistics.sites.items() if found.get(name) is not None})
