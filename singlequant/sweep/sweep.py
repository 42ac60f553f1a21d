# SPDX-License-Identifier: Apache-2.0
"""The one sweep over a model's layers: calibrate, solve, quantize, hand over.

    view = prepare(checkpoint, config, windows)
    outcome, = sweep(view, windows, [Job(config, out=Path("OUT"))])

Everything that quantizes a whole model comes through `sweep`: one recipe or many side by side, with
the methods of the package or with functions of an experiment's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..config import KV_BITS, QuantConfig
from ..export.card import Figures
from ..export.writer import ModelWriter
from ..info import __version__
from ..methods.registry import METHODS
from ..methods.solve import config_int8_step
from ..rotations import LayerRotations
from ..statistics import LayerStatistics
from ..weights import WEIGHT_BITS, QuantizedLayer
from .bits import predict_noise, settle_bits
from .calibrate import calibrate
from .layer import quantize_layer
from .measure import Measured, measure
from .prepare import View, solve
from .stream import in_parts
from .texts import token_digest

if TYPE_CHECKING:
    from .spread import Spread

STAGES = ("calibrate", "solve", "quantize")

Solve = Callable[[LayerStatistics], LayerRotations]
Quantize = Callable[..., QuantizedLayer]
Observe = Callable[[LayerStatistics, QuantizedLayer], None]


@dataclass(frozen=True, eq=False)
class Job:
    """One way to quantize the model of a sweep, and where the layers go.

    out: the packed folder to write, which appears when it is whole; None writes nothing. resume:
    go on with the layers that an interrupted run left in OUT.partial. scratch: OUT belongs to the
    caller alone, so an existing folder is replaced and OUT.partial never stays behind.
    solve(statistics) replaces the solver of config.method; jobs that share one function share what
    it returns. quantize(view, rotations, config) replaces `quantize_layer`, which also takes the
    bits by linear where config.bits is above 4.
    observe(statistics, layer) is called with each layer that was made, after it was written.
    check(folder) measures the whole folder before it is named OUT, for the model card; its time is
    no stage's.
    """

    config: QuantConfig
    out: Path | None = None
    resume: bool = False
    scratch: bool = False
    solve: Solve | None = None
    quantize: Quantize = quantize_layer
    observe: Observe | None = None
    check: Callable[[Path], Figures | None] | None = None


@dataclass(frozen=True)
class SiteCounts:
    """What the solver did at one site: Kronecker sizes (or blocks and their size), numbers of
    Givens rotations, whether a balance is folded, and inputs that keep 8 bits."""

    layer: int
    site: str
    k1: int
    k2: int
    art_steps: int
    urt_steps: int
    sweep_rotations: int
    balanced: bool
    int8_inputs: int
    borrowed: bool  # calibrated on the union of the layer's experts, as its own saw too few tokens


@dataclass
class Outcome:
    """What a job took and whether it failed.

    seconds: by stage, as if the job had run alone; "quantize" includes packing and writing.
    choosing: of "solve", what the choice of bits took, which looks at all layers beforehand.
    peaks: bytes of anonymous memory of the process, the largest of each stage. error: why there is
    no folder, or None. config: the job's, its bits settled, where there was something to settle.
    resumed_layers: those taken over from an interrupted run. sites: of the layers made now.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    choosing: float = 0.0
    peaks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    error: str | None = None
    config: QuantConfig | None = None
    resumed_layers: int = 0
    sites: list[SiteCounts] = field(default_factory=list)

    @property
    def peak_memory(self) -> int:
        """The largest of the stages' peaks, in bytes."""
        return max(self.peaks.values())

    def add(self, stage: str, measured: Measured) -> Any:
        """Count a measured call as part of a stage; its value, None when it failed."""
        self.seconds[stage] += measured.seconds
        self.peaks[stage] = max(self.peaks[stage], measured.peak_memory)
        self.error = self.error or measured.error
        return measured.value

    def merge(self, other: Outcome) -> None:
        """Count what a worker did."""
        for stage in STAGES:
            self.seconds[stage] += other.seconds[stage]
            self.peaks[stage] = max(self.peaks[stage], other.peaks[stage])
        self.error = self.error or other.error
        self.sites.extend(other.sites)


def sweep(
    view: View,
    windows: NDArray[np.int64],
    jobs: Sequence[Job],
    *,
    layers: int | None = None,
    written: str | None = None,
    failures: tuple[type[Exception], ...] = (),
    progress: Callable[[int, int], None] | None = None,
    spread: Spread | None = None,
) -> tuple[Outcome, ...]:
    """Quantize the model in every way that a job asks for; an Outcome per job, in order.

    view: what `prepare` returned for the jobs' method. windows: token ids [count, length]. Each
    layer's statistics are computed once for all jobs, and its rotations once for jobs of equal
    method, seed and step of 8-bit inputs. One layer is in memory at a time. Layers that every job
    has already are passed through. layers: stop after so many, without finishing the folders.
    written: the word for windows that the model wrote (`written_by_model`), for recipe.json.
    failures: exceptions that end one job and leave its message in its outcome; all others end the
    sweep. progress(layers done, layers) is called after each layer; an exception in it cancels.
    spread: workers that make the layers, the same bytes (spread.py).
    """
    if spread is not None:
        spread.check(jobs)
    provenance = {"version": __version__, "calibration_sha256": token_digest(windows),
                  **({"calibration": written} if written else {})}
    works = [Work(job, view, failures) for job in jobs]
    calibration_bits = max(job.config.calibration_bits for job in jobs)
    if any(work.job.config.bits > WEIGHT_BITS[0] for work in works):
        predict = predict_noise if spread is None else spread.predict_noise
        noise = measure(predict, view, windows, calibration_bits, failures=failures)
        for work in works:
            work.assign(noise)
    limit = view.spec.layers if layers is None else layers
    with contextlib.ExitStack() as stack:
        for work in works:
            stack.push(work.close)
            if work.outcome.error is None:
                work.attempt("quantize", work.open, provenance)
        running = [work for work in works if work.outcome.error is None]
        if spread is not None and running:
            spread.make_layers(view, windows, running, calibration_bits, progress)
        elif running:
            _in_order(view, windows, running, calibration_bits, limit, progress)
        if layers is None:
            for work in works:
                if work.outcome.error is None:
                    work.finish()
    return tuple(work.outcome for work in works)


def _in_order(
    view: View, windows: NDArray[np.int64], running: Sequence[Work], bits: int, limit: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """The layers up to `limit`, one after the other, for works that have not failed."""
    done = set.intersection(*(work.finished for work in running))
    inputs = any(work.job.config.weights == "gptq" for work in running)
    statistics = calibrate(view, windows, progress=progress, skip=done, keep_inputs=inputs,
                           bits=bits)
    while running:
        index = sweep_layer(view, statistics, running)
        if index is None or index + 1 >= limit:
            break
        running = [work for work in running if work.outcome.error is None]
    if limit == view.spec.layers:
        for _ in statistics if running else ():  # the last layer's progress
            pass


def sweep_layer(
    view: View, layers: Iterator[LayerStatistics], works: Sequence[Work]
) -> int | None:
    """One layer for all works; its index, or None behind the last one.

    What a layer holds is a local of this function: it is dropped before the next one is made.
    """
    measured = measure(next, layers, None)
    statistics = measured.value
    if statistics is None:
        return None
    solved: dict[Any, Measured] = {}
    for work in works:
        work.outcome.add("calibrate", measured)  # alone, it would need them as well
        if statistics.index in work.finished:
            continue
        key = work.solver_key
        if key not in solved:
            solved[key] = measure(work.solve, statistics, failures=work.failures)
        rotations = work.outcome.add("solve", solved[key])
        if work.outcome.error is None:
            work.hand_over(statistics, rotations)
    return statistics.index


class Work:
    """A job under way: its open folder, the layers it has, and what it took so far."""

    def __init__(
        self, job: Job, view: View, failures: tuple[type[Exception], ...]
    ) -> None:
        self.job, self.view, self.failures = job, view, failures
        self.outcome = Outcome()
        self.finished: set[int] = set()
        self.bits: dict[str, int] = {}  # by linear, those with more than 4
        self.writer: Any = None  # a ModelWriter, or what takes its place in a worker

    @property
    def solver_key(self) -> Any:
        """Equal for jobs whose rotations are equal."""
        config = self.job.config
        return self.job.solve or (config.method, config.seed, config_int8_step(config))

    def attempt(self, stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call and count as part of a stage; None when it failed."""
        return self.outcome.add(stage, measure(function, *arguments, failures=self.failures))

    def assign(self, noise: Measured) -> None:
        """Choose the bits of each linear, and of embedding and head. noise: of `predict_noise`."""
        if self.job.config.bits > WEIGHT_BITS[0] and self.outcome.add("solve", noise) is not None:
            self.outcome.choosing = noise.seconds
            config, self.bits = settle_bits(self.view, self.job.config, noise.value)
            self.job = replace(self.job, config=config)
            self.outcome.config = config

    def open(self, provenance: dict[str, str]) -> None:
        """Start the folder. ValueError when the config does not suit the model."""
        job = self.job
        if job.out is None:
            return
        self.writer = ModelWriter(
            job.out, self.view, job.config, resume=job.resume, resumable=not job.scratch,
            replace=job.scratch, provenance=provenance, bits=self.bits, blas=self._has_blas_sums(),
        ).__enter__()
        self.finished = self.writer.finished_layers()
        self.outcome.resumed_layers = len(self.finished)

    def _has_blas_sums(self) -> bool:
        """Whether another BLAS library would give other bytes."""
        config, given = self.job.config, self.job.solve or self.job.quantize is not quantize_layer
        return (bool(given) or METHODS[config.method].blas or config.kv_bits < max(KV_BITS)
                or not in_parts(self.view.spec, config.calibration_bits))

    def solve(self, statistics: LayerStatistics) -> LayerRotations:
        """A layer's rotations, with the statistics that they are from."""
        if self.job.solve is None:
            return solve(self.view, statistics, self.job.config)
        return replace(self.job.solve(statistics), statistics=statistics)

    def hand_over(self, statistics: LayerStatistics, rotations: LayerRotations) -> None:
        """Make one layer, write it and show it to the job's observer."""
        layer = self.attempt("quantize", self.make, rotations)
        if layer is None:
            return
        self.outcome.sites.extend(_counts(statistics, layer))
        if self.job.observe is not None:
            self.job.observe(statistics, layer)

    def bits_of(self, index: int) -> dict[str, int]:
        """The part of `bits` that is of one layer."""
        names = [linear.at(index) for linear in self.view.spec.layer(index).linears.values()]
        return {name: self.bits[name] for name in names if name in self.bits}

    def take(
        self, index: int, outcome: Outcome, shard: str | None, entry: Mapping[str, Any]
    ) -> None:
        """Count and keep what a worker made of a layer."""
        self.outcome.merge(outcome)
        if shard is not None and self.writer is not None:
            self.attempt("quantize", self.writer.take_layer, index, Path(shard), entry)

    def make(self, rotations: LayerRotations) -> QuantizedLayer:
        """Rotate, round and pack one layer, and write it."""
        bits = (self.bits,) if self.bits else ()
        layer = self.job.quantize(self.view, rotations, self.job.config, *bits)
        if self.writer is not None:
            self.writer.write_layer(layer)
        return layer

    def finish(self) -> None:
        """Complete the folder, measure it where the job asks for that, and give it its name."""
        if self.writer is None:
            return
        folder, figures = self.attempt("quantize", self.writer.complete), None
        if folder is not None and self.job.check is not None:
            figures = self.job.check(folder)
        if folder is not None:
            self.attempt("quantize", self.writer.finish, figures)

    def close(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove what is unfinished, unless it is to be resumed."""
        if self.writer is None:
            return
        if self.job.scratch:
            kind = error = trace = None
        self.writer.__exit__(kind, error, trace)


def _counts(statistics: LayerStatistics, layer: QuantizedLayer) -> list[SiteCounts]:
    return [
        SiteCounts(layer.index, name, *r.sizes, *map(r.givens_count, ("ART", "URT", "sweep")),
                   r.balance is not None, layer.int8_inputs.get(name, 0),
                   statistics.borrowed(name))
        for name, r in layer.rotations.items()
    ]
