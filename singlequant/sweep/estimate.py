# SPDX-License-Identifier: Apache-2.0
"""What a sweep would make and take, from its first layer: nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.folder import load_checkpoint
from ..config import QuantConfig
from ..export.writer import check_run, estimate_size
from ..files import folder_bytes
from .measure import measure
from .prepare import prepare
from .sweep import Job, sweep
from .texts import calibration_windows


@dataclass(frozen=True)
class Estimate:
    """What a sweep would make and take: bytes within a few percent, seconds from one layer."""

    bytes_before: int
    bytes_after: int
    seconds: float
    peak_memory: int


def dry_run(
    model: str | Path, config: QuantConfig | None = None, calibration: str | Path | None = None
) -> Estimate:
    """Process the first layer, write nothing, and scale up."""
    config = config or QuantConfig()
    checkpoint = load_checkpoint(model)
    check_run(None, checkpoint, config)
    windows = calibration_windows(checkpoint, config, calibration)
    prepared = measure(prepare, checkpoint, config, windows)
    (first,) = sweep(prepared.value, windows, [Job(config)], layers=1)
    layers = sum(first.seconds.values()) * checkpoint.spec.layers
    return Estimate(
        folder_bytes(checkpoint.path), estimate_size(prepared.value, config),
        prepared.seconds + layers, max(prepared.peak_memory, first.peak_memory),
    )
