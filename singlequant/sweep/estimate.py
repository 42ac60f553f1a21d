# SPDX-License-Identifier: Apache-2.0
"""What a sweep would make and take, from its first layers: nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.folder import Checkpoint, open_model
from ..config import QuantConfig
from ..export.packed import outer_tensors
from ..export.partial import OUTER, content_digest, source_of
from ..export.writer import check_run, estimate_size
from ..html import facts_html, megabytes
from ..models.spec import ModelSpec
from ..rotations import factors_text, poor_factors
from .measure import measure
from .prepare import View, prepare
from .sweep import Job, sweep
from .texts import calibration_windows


@dataclass(frozen=True)
class Estimate:
    """What a sweep would make and take: bytes within a few percent, seconds from the first layers.

    poor_factors: (k1, k2) of the sites whose k has no two short factors; see rotations.py.
    """

    bytes_before: int
    bytes_after: int
    seconds: float
    peak_memory: int
    poor_factors: dict[str, tuple[int, int]]

    def _repr_html_(self) -> str:
        return facts_html("Estimate", {
            "size": f"{megabytes(self.bytes_before)} → {megabytes(self.bytes_after)} (within a few "
                    "percent)",
            "time": f"about {self.seconds:.1f} s (the first layers', scaled up)",
            "peak memory": f"about {megabytes(self.peak_memory)} besides the mapped weights",
            "no short factors": factors_text(self.poor_factors) or None,
        })


def dry_run(
    model: str | Path | Checkpoint, config: QuantConfig | None = None,
    calibration: str | Path | None = None,
    writing: Callable[[int, int], None] | None = None,
) -> Estimate:
    """Process two layers, or as many as end with the first of the largest; write nothing, and scale
    up by weights.

    Most models have layers of one size. Others begin with dense ones before those with experts.
    What looks at the whole model before the first layer is done in full, and so are embedding and
    head. What the disk takes does not count.
    calibration, writing: as for `quantize_folder`. The time of a text that the model writes counts.
    """
    config = config or QuantConfig()
    checkpoint = open_model(model)
    if not config.leaves_tables_open:
        config = config.settled(checkpoint.spec.tied)  # before a method unties the head
    check_run(None, checkpoint, config)
    chosen = measure(calibration_windows, checkpoint, config, calibration, writing)
    windows = chosen.value
    prepared = measure(prepare, checkpoint, config, windows)
    weights = _weights(checkpoint.spec)
    count = min(max(2, weights.index(max(weights)) + 1), len(weights))
    (first,) = sweep(prepared.value, windows, [Job(config)], layers=count)
    outer = measure(_outer, prepared.value, first.config or config)
    each = sum(first.seconds.values()) - first.choosing
    layers = first.choosing + each * sum(weights) / sum(weights[:count])
    return Estimate(
        checkpoint.bytes_with_tokenizer, estimate_size(prepared.value, config),
        chosen.seconds + prepared.seconds + layers + outer.seconds,
        max(prepared.peak_memory, first.peak_memory, outer.peak_memory),
        poor_factors({name: site.k for kind in checkpoint.spec.kinds
                      for name, site in kind.sites.items()}),
    )


def _outer(view: View, config: QuantConfig) -> None:
    """What a run does to the tensors outside the layers: they are rounded, their source hashed."""
    outer_tensors(view.outer, config.table_bits(view.spec))
    content_digest(source_of(view), OUTER)


def _weights(spec: ModelSpec) -> list[int]:
    """How many weights the linears of each layer have."""
    by_kind = [sum(linear.n * linear.k for linear in kind.linears.values()) for kind in spec.kinds]
    return [by_kind[spec.pattern[i % len(spec.pattern)]] for i in range(spec.layers)]
