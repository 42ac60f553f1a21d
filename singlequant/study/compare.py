"""Methods x schemes on one model: quality, seconds, memory and size, in one resumable run."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.folder import Checkpoint, load_checkpoint
from ..config import QuantConfig
from ..export.writer import ModelWriter
from ..files import check_picture, save_figure, write_file
from ..info import __version__, machine_info
from ..methods.registry import METHODS
from ..methods.solve import config_int8_step
from ..methods.spinquant import load_learned
from ..runtime.model import Model
from ..statistics import LayerStatistics
from ..sweep.calibrate import calibrate
from ..sweep.layer import quantize_layer
from ..sweep.run import (
    PeakMemory,
    bundled_text,
    calibration_tokens as calibration_windows,
    check_outer,
    default_seq_len,
    folder_bytes,
    prepare,
    read_text,
    solve,
)
from .evaluate import CachedScorer, Evaluation, evaluate, split_windows

ROWS_FILE = "rows.jsonl"
EQUAL_CLIP = 1.0  # activations are not clipped in rows of equal rounding
STAGES = ("calibrate", "solve", "quantize", "evaluate")
# What a method may fail with on a model that others can treat; anything else ends the run.
FAILURES = (ValueError, ArithmeticError, RuntimeError, ImportError, MemoryError)


# ---- the result ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of a comparison: the original (config None) or one quantized model.

    results has one Evaluation per text. seconds: what this row alone would take, by stage; the
    quantize stage packs and writes. peak_memory: anonymous bytes while it was made; None for the
    original. error: why there are no figures, or None.
    """

    config: QuantConfig | None
    default: bool = False  # the recipe's own rounding, not that of the other rows
    results: tuple[Evaluation, ...] = ()
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    bytes_on_disk: int | None = None
    error: str | None = None

    @property
    def method(self) -> str:
        """The method's name; "original" for the unquantized model."""
        return "original" if self.config is None else self.config.method

    @property
    def scheme(self) -> str:
        """The scheme's name; "16-bit" for the unquantized model."""
        return "16-bit" if self.config is None else self.config.scheme

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; from_json() takes it back."""
        return {
            "method": self.method,
            "scheme": self.scheme,
            "default": self.default,
            "config": None if self.config is None else self.config.to_json(),
            "results": [result.to_json() for result in self.results],
            "tasks": {task: dict(values) for task, values in self.tasks.items()},
            "seconds": dict(self.seconds),
            "peak_memory": self.peak_memory,
            "bytes_on_disk": self.bytes_on_disk,
            "error": self.error,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        """The row of a dict."""
        values = {k: v for k, v in values.items() if k not in ("method", "scheme")}
        config = values["config"]
        values["config"] = None if config is None else QuantConfig.from_json(config)
        values["results"] = tuple(Evaluation(**result) for result in values["results"])
        return cls(**values)


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` found: the original's row, then those of the methods in the order asked."""

    model: str
    fingerprint: str
    texts: tuple[str, ...]
    seq_len: int
    calibration: str
    rows: tuple[Row, ...]
    machine: Mapping[str, Any]

    def __repr__(self) -> str:
        lines = [f"Comparison({self.model!r}, {len(self.rows)} rows)", self.table()]
        return "\n".join(lines + self._notes())

    def _repr_markdown_(self) -> str:
        return "\n\n".join([self.markdown(), *self._notes()]).replace("*", r"\*")

    def table(self) -> str:
        """Aligned columns; `*` marks the lowest divergence from the original in each scheme."""
        columns = self._cells()
        widths = [max(map(len, column)) for column in columns]
        text = [c in _TEXT_COLUMNS for c, *_ in columns]
        lines = [
            "  ".join(cell.ljust(width) if left else cell.rjust(width)
                      for cell, width, left in zip(line, widths, text, strict=True)).rstrip()
            for line in zip(*columns, strict=True)
        ]
        return "\n".join(lines)

    def markdown(self) -> str:
        """The same table in Markdown."""
        head, *lines = zip(*self._cells(), strict=True)
        rule = ["---" if cell in _TEXT_COLUMNS else "---:" for cell in head]
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))

    def _notes(self) -> list[str]:
        """What stands below the table: the mark's meaning and why rows have no figures."""
        notes = ["* lowest KL of its scheme"] if self._best() else []
        failed = [row for row in self.rows if row.error]
        return notes + [f"{row.scheme} {_name(row)}: {row.error}" for row in failed]

    def _best(self) -> set[tuple[int, int]]:
        """(row, text) of the lowest divergences by scheme; none where a scheme has one row."""
        best = set()
        for scheme in {row.scheme for row in self.rows if row.config}:
            rows = [i for i, row in enumerate(self.rows) if row.scheme == scheme and row.results]
            if len(rows) > 1:
                best |= {(min(rows, key=lambda i: self.rows[i].results[t].kl_mean), t)
                         for t in range(len(self.texts))}
        return best

    def _cells(self) -> list[list[str]]:
        """The table by columns, each with its header first."""
        quantized = [row.config for row in self.rows if row.config]

        def varies(name: str) -> bool:
            return len({getattr(config, name) for config in quantized}) > 1

        columns = [["scheme", *(row.scheme for row in self.rows)],
                   ["method", *map(_name, self.rows)]]
        for header, name in (("weights", "weights"), ("clip", "activation_clip"),
                             ("group", "group_size"), ("seed", "seed")):
            if name in ("weights", "activation_clip") or varies(name):
                columns.append([header, *(f"{getattr(row.config, name)}" if row.config else ""
                                          for row in self.rows)])
        best = self._best()
        for t, text in enumerate(self.texts):
            suffix = f" {text}" if len(self.texts) > 1 else ""
            for header, name, form in _MEASURES:
                cells = [_format(getattr(row.results[t], name), form) if row.results else "-"
                         for row in self.rows]
                if name == "kl_mean":
                    cells = [cell + ("*" if (i, t) in best else " ")
                             for i, cell in enumerate(cells)]
                columns.append([header + suffix, *cells])
        for task, metric in self._task_columns():
            values = [row.tasks.get(task, {}).get(metric) for row in self.rows]
            columns.append([f"{task} {metric}", *(_format(value, ".4f") for value in values)])
        for stage in STAGES:
            columns.append([f"{stage} s", *(_format(row.seconds.get(stage), ".2f")
                                            for row in self.rows)])
        for header, name in (("peak MB", "peak_memory"), ("disk MB", "bytes_on_disk")):
            columns.append([header, *(_format(_scaled(getattr(row, name)), ".1f")
                                      for row in self.rows)])
        return columns

    def _task_columns(self) -> list[tuple[str, str]]:
        pairs = [(task, metric) for row in self.rows for task, values in row.tasks.items()
                 for metric in values]
        return list(dict.fromkeys(pairs))

    def records(self) -> list[dict[str, Any]]:
        """The rows as flat dicts of equal keys, one per column of the CSV; None where empty."""
        names = ("weights", "activation_clip", "group_size", "calibration_tokens", "seed")
        records = []
        for row in self.rows:
            record = {"method": row.method, "default": row.default, "scheme": row.scheme}
            record |= {name: getattr(row.config, name, None) for name in names}
            for t, text in enumerate(self.texts):
                suffix = f"[{text}]" if len(self.texts) > 1 else ""
                record |= {f"{name}{suffix}": getattr(row.results[t], name) if row.results else None
                           for _, name, _ in _MEASURES}
            record |= {f"{task}.{metric}": row.tasks.get(task, {}).get(metric)
                       for task, metric in self._task_columns()}
            record |= {f"{stage}_seconds": row.seconds.get(stage) for stage in STAGES}
            record |= {"peak_memory_bytes": row.peak_memory, "disk_bytes": row.bytes_on_disk,
                       "error": row.error}
            records.append(record)
        return records

    def to_csv(self, path: str | Path) -> Path:
        """Write the rows as comma-separated values; the file appears only when whole."""
        text = io.StringIO()
        records = self.records()
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return write_file(path, text.getvalue())

    def to_json(self, path: str | Path) -> Path:
        """Write rows, texts and the machine as JSON; the file appears only when whole."""
        values = {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "texts": list(self.texts),
            "seq_len": self.seq_len,
            "calibration": self.calibration,
            "machine": dict(self.machine),
            "rows": [row.to_json() for row in self.rows],
        }
        return write_file(path, json.dumps(values, indent=1, allow_nan=False) + "\n")

    def plot(self, path: str | Path | None = None):
        """matplotlib Figure: KL (log) of each method, a panel per scheme and a row per text, with
        the perplexity beside each dot; seeds are dots of one line. Saved to `path` when given (its
        suffix is the format), appearing only when whole. ImportError without matplotlib."""
        if path is not None:
            check_picture(path)
        from matplotlib.figure import Figure

        schemes = list(dict.fromkeys(row.scheme for row in self.rows if row.config))
        height = max(len(self._lines(scheme)) for scheme in schemes)
        size = (1 + 5 * len(schemes), len(self.texts) * (1.3 + 0.32 * height))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(self.texts), len(schemes), squeeze=False, sharex="row")
        original = self.rows[0]
        for (t, text), (s, scheme) in itertools.product(enumerate(self.texts), enumerate(schemes)):
            _draw_panel(panels[t, s], self._lines(scheme), t)
            panels[t, s].set(title=f"{self.model}, {scheme}, {text}")
            if t == len(self.texts) - 1:
                panels[t, s].set_xlabel("KL to the original, nats per token")
        perplexities = ", ".join(f"{result.perplexity:.2f} on {text}" for result, text
                                 in zip(original.results, self.texts, strict=True))
        figure.suptitle(f"beside each dot: perplexity (the original's: {perplexities})",
                        fontsize="small")
        if path is not None:
            save_figure(figure, path)
        return figure

    def _lines(self, scheme: str) -> dict[str, list[Row]]:
        """A scheme's rows by label; rows that differ in the seed alone share one."""
        rows = [row for row in self.rows if row.scheme == scheme and row.config]
        several = len({row.config.weights for row in rows if not row.default}) > 1
        lines: dict[str, list[Row]] = {}
        for row in rows:
            rounding = f", {row.config.weights}" if several and not row.default else ""
            lines.setdefault(_name(row) + rounding, []).append(row)
        return lines


_TEXT_COLUMNS = ("scheme", "method", "weights")
_MEASURES = (("perplexity", "perplexity", ".3f"), ("KL", "kl_mean", ".5f"),
             ("KL p99", "kl_p99", ".4f"), ("top-1", "top1_agreement", ".3f"))


def _name(row: Row) -> str:
    return f"{row.method} (default)" if row.default else row.method


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _scaled(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _draw_panel(axis, lines: Mapping[str, list[Row]], t: int) -> None:
    """One dot per row with figures, the perplexity beside the line's last, a word where none."""
    axis.set_xscale("log")
    axis.set_yticks(range(len(lines)), labels=list(lines))
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.grid(axis="both", color="0.9")
    axis.set_axisbelow(True)
    for y, rows in enumerate(lines.values()):
        done = [row.results[t] for row in rows if row.results and row.results[t].kl_mean > 0]
        if not done:
            axis.annotate("failed", (0.02, y), xycoords=("axes fraction", "data"), va="center",
                          fontsize="small", color="0.5")
            continue
        kl = [result.kl_mean for result in done]
        axis.plot(kl, [y] * len(kl), "o", color="tab:orange" if rows[0].default else "tab:blue")
        mean = sum(result.perplexity for result in done) / len(done)
        axis.annotate(f"{mean:.2f}", (max(kl), y), xytext=(7, 0), textcoords="offset points",
                      va="center", fontsize="small")
    axis.margins(x=0.2)  # room for the figures


# ---- what to do ---------------------------------------------------------------------------------


def default_methods() -> tuple[str, ...]:
    """Every method that needs no extra, the plain rounding first."""
    return ("none", *(m.name for m in METHODS.values() if m.name != "none" and not m.extra))


def _configs(
    methods: Sequence[str] | None, schemes: Sequence[str], weights: Sequence[str], clip: float,
    group_size: int, tokens: int | None, seeds: Sequence[int], defaults: bool,
) -> list[tuple[QuantConfig, bool]]:
    """(config, whether it is the recipe's default) of every row, in the table's order."""
    methods = default_methods() if methods is None else methods
    lists = {"methods": methods, "schemes": schemes, "weights": weights, "seeds": seeds}
    for name, values in lists.items():
        if isinstance(values, str) or not len(values):
            raise ValueError(f"{name}: expected a list of at least one, found {values!r}")
    common = {} if tokens is None else {"calibration_tokens": tokens}
    rows = []
    for scheme in dict.fromkeys(schemes):
        for seed, rounding, method in itertools.product(*map(dict.fromkeys,
                                                             (seeds, weights, methods))):
            rows.append((QuantConfig(scheme=scheme, method=method, weights=rounding, seed=seed,
                                     clip=clip, group_size=group_size, **common), False))
        if defaults:
            rows += [(QuantConfig(scheme=scheme, seed=seed, **common), True)
                     for seed in dict.fromkeys(seeds)]
    return rows


@dataclass(frozen=True)
class _Text:
    """A text to evaluate on: its name in the table and its windows' tokens [count * seq_len]."""

    name: str
    tokens: NDArray[np.int64]

    @property
    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.tokens)).hexdigest()


def _read_texts(
    checkpoint: Checkpoint, files: Sequence[str | Path] | None, seq_len: int, windows: int | None
) -> list[_Text]:
    """The texts' first windows. ValueError names the file that is empty or too short."""
    if windows is not None and windows < 1:
        raise ValueError(f"windows: expected at least 1, found {windows}")
    if files is None:
        sources = {"heldout": ("bundled text", bundled_text("heldout"))}
    else:
        if isinstance(files, (str, Path)):
            files = [files]
        if not files:
            raise ValueError("texts: expected at least one file, found none")
        paths = [Path(file) for file in dict.fromkeys(map(str, files))]
        alike = len({path.stem for path in paths}) < len(paths)
        sources = {str(p) if alike else p.stem: (str(p), read_text(p)) for p in paths}
    texts = []
    for name, (source, text) in sources.items():
        try:
            whole = split_windows(checkpoint.encode(text), seq_len)[:windows]
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        texts.append(_Text(name, whole.reshape(-1)))
    return texts


def _folder_digest(folder: str | Path | None) -> str | None:
    """sha256 of a folder's files and their names."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _key(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class RowsFile:
    """Finished rows as JSON lines {"key", "row"}, kept for a later run; path None keeps nothing.

    A line {"key", "built"} says what making a packed folder cost that is not evaluated yet. A last
    line without its end is cut off; ValueError names any other line that is damaged, and a file
    that another run is using.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, Any] = {}
        self.built: dict[str, Any] = {}

    def __enter__(self) -> RowsFile:
        if self.path is None:
            return self
        self._file = self.path.open("a+b")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self.path is not None:
            self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: in use by another run") from None
        except OSError:
            pass  # some network file systems cannot lock

    def _read(self) -> None:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                if "row" in values:
                    Row.from_json(values["row"])
                    self.rows[values["key"]] = values["row"]
                else:
                    self.built[values["key"]] = values["built"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.path}, line {number}: expected a row of a comparison, "
                                 f"found: {error}") from None
        if torn:
            self._file.truncate(self._file.tell() - len(torn))

    def add(self, key: str, kind: str, values: Mapping[str, Any], durable: bool = True) -> None:
        """Append a "row" or what was "built"; durable: on the disk when this returns."""
        (self.rows if kind == "row" else self.built)[key] = dict(values)
        if durable and self.path is not None:
            self._file.write(json.dumps({"key": key, kind: values}, allow_nan=False).encode())
            self._file.write(b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


# ---- doing it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """What a call gave, or why it failed, and what it took."""

    value: Any
    error: str | None
    seconds: float
    peak_memory: int


def _measure(function: Callable[..., Any], *arguments: Any) -> _Measured:
    """Call it; a failure that is the method's own is a result too."""
    value = error = None
    with PeakMemory() as memory:
        start = time.perf_counter()
        try:
            value = function(*arguments)
        except FAILURES as failure:
            error = _reason(failure)
        seconds = time.perf_counter() - start
    return _Measured(value, error, seconds, memory.peak)


def _memory() -> int:
    """Anonymous bytes of this process now."""
    with PeakMemory() as memory:
        return memory.start


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Build:
    """One packed folder in the making, with a clock and a memory peak of its own."""

    def __init__(self, key: str, config: QuantConfig, out: Path) -> None:
        self.key, self.config, self.out = key, config, out
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.peak_memory = 0
        self.error: str | None = None
        self._writer: ModelWriter | None = None

    def charge(self, stage: str, measured: _Measured) -> Any:
        """Put a measured call on this row's bill; its value, None when it failed."""
        self.seconds[stage] += measured.seconds
        self.peak_memory = max(self.peak_memory, measured.peak_memory)
        self.error = self.error or measured.error
        return measured.value

    def open(self, view: Checkpoint, provenance: Mapping[str, str]) -> None:
        """Start the folder. ValueError when the config does not suit the model."""
        if self.out.exists():  # its row was never finished, and nothing tells what it took
            shutil.rmtree(self.out)
        self._writer = ModelWriter(self.out, view, self.config, provenance=provenance).__enter__()

    def write(self, view: Checkpoint, rotations: Any) -> None:
        """Rotate, round, pack and write one layer."""
        self._writer.write_layer(quantize_layer(view, rotations, self.config))

    def finish(self) -> None:
        self._writer.finish()

    def close(self) -> None:
        """Leave no partial folder, whatever ended the run."""
        if self._writer is not None:
            self._writer.__exit__(None, None, None)

    def cost(self, held: int) -> dict[str, Any]:
        """Seconds, peak memory but for what the run held before, and size, as RowsFile keeps it."""
        return {"seconds": self.seconds, "peak_memory": max(0, self.peak_memory - held),
                "bytes_on_disk": folder_bytes(self.out)}


def _build_together(
    view: Checkpoint, windows: NDArray[np.int64], builds: Sequence[_Build],
    progress: Callable[[], None],
) -> None:
    """One sweep for many methods: each layer's statistics are taken once, solved once per method
    and written to every folder; one layer is in memory at a time. Failures end their row only."""
    digest = hashlib.sha256(np.ascontiguousarray(windows)).hexdigest()
    provenance = {"version": __version__, "calibration_sha256": digest}
    with contextlib.ExitStack() as stack:
        for build in builds:
            stack.callback(build.close)
            build.seconds["solve"] += getattr(view, "seconds", 0.0)  # of learned rotations
            build.charge("quantize", _measure(build.open, view, provenance))
        keep = any(build.config.weights == "gptq" for build in builds)
        layers = calibrate(view, windows, keep_inputs=keep)
        for _ in range(view.shape.layers):
            alive = [build for build in builds if build.error is None]
            if not alive:
                return
            statistics = _calibrate_next(layers, alive)
            _treat_layer(view, statistics, alive)
            del statistics  # not alive while the next layer's are taken
            progress()
        for build in builds:
            if build.error is None:
                build.charge("quantize", _measure(build.finish))


def _calibrate_next(layers: Iterator[LayerStatistics], builds: Sequence[_Build]) -> LayerStatistics:
    """The next layer's statistics, on everyone's bill: each alone would need them."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        statistics = next(layers)
        seconds = time.perf_counter() - start
    for build in builds:
        build.charge("calibrate", _Measured(None, None, seconds, memory.peak))
    return statistics


def _treat_layer(view: Checkpoint, statistics: LayerStatistics, builds: Sequence[_Build]) -> None:
    """Solve, quantize and write one layer for every row."""

    solved: dict[tuple, _Measured] = {}
    for build in builds:
        config = build.config
        key = config.method, config.seed, config_int8_step(config)
        if key not in solved:
            solved[key] = _measure(solve, view, statistics, build.config)
        rotations = build.charge("solve", solved[key])
        if build.error is None:
            build.charge("quantize", _measure(build.write, view, rotations))


class _Judge:
    """Evaluates models on the texts and tasks; the original runs once for all of them."""

    def __init__(self, checkpoint: Checkpoint, texts: Sequence[_Text], seq_len: int,
                 tasks: Sequence[str], task_folder: str | Path | None) -> None:
        self._checkpoint, self._texts, self._seq_len = checkpoint, texts, seq_len
        self._tasks, self._task_folder = tasks, task_folder

    @functools.cached_property
    def _original(self) -> CachedScorer:
        return CachedScorer(Model(self._checkpoint))

    def original(self) -> Row:
        """The original's row: its divergence from itself is 0."""
        start = time.perf_counter()
        results = [evaluate(self._original, text.tokens, self._seq_len) for text in self._texts]
        results = [replace(r, kl_mean=0.0, kl_p99=0.0, top1_agreement=1.0,
                           reference_perplexity=r.perplexity) for r in results]
        tasks = self._task_values(self._original.model)
        return Row(None, results=tuple(results), tasks=tasks,
                   seconds={"evaluate": time.perf_counter() - start},
                   bytes_on_disk=folder_bytes(self._checkpoint.path))

    def quantized(self, folder: Path, row: Row) -> Row:
        """The row with what the packed folder is worth; with the reason when it cannot be run."""
        start = time.perf_counter()
        try:
            model = Model(load_checkpoint(folder))
            results = [evaluate(model, text.tokens, self._seq_len, self._original)
                       for text in self._texts]
            tasks = self._task_values(model)
        except FAILURES as error:
            return replace(row, error=_reason(error))
        seconds = {**row.seconds, "evaluate": time.perf_counter() - start}
        return replace(row, results=tuple(results), tasks=tasks, seconds=seconds)

    def _task_values(self, model: Model) -> dict[str, dict[str, float]]:
        if not self._tasks:
            return {}
        from ..harness import evaluate_tasks

        found = evaluate_tasks(model, list(self._tasks), self._task_folder)
        return {task: {metric: float(value) for metric, value in values.items()
                       if isinstance(value, (int, float)) and math.isfinite(value)}
                for task, values in found.items()}


def compare(
    model: str | Path,
    methods: Sequence[str] | None = None,
    schemes: Sequence[str] = ("w4a4", "w4a8"),
    weights: Sequence[str] = ("rtn",),
    clip: float = EQUAL_CLIP,
    group_size: int = 0,
    texts: Sequence[str | Path] | None = None,
    seq_len: int | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    seeds: Sequence[int] = (0,),
    tasks: Sequence[str] = (),
    task_folder: str | Path | None = None,
    windows: int | None = None,
    out: str | Path | None = None,
    rows_file: str | Path | None = None,
    defaults: bool = True,
    progress: Callable[[int, int], None] | None = None,
    learned: str | Path | None = None,
) -> Comparison:
    """Quantize a `save_pretrained` folder by each method and scheme, and evaluate each result.

    All methods (default: those without an extra) round alike: `weights` and `clip`, group_size;
    `defaults` adds a row per scheme and seed with the recipe's own rounding. texts: files (default:
    the bundled held-out text), cut into windows of seq_len tokens (default: the model's maximum,
    2048 at most), of which the first `windows` count (default: all). tasks: names for
    lm-evaluation-harness, with local ones in task_folder.

    The model is calibrated once per seed for all rows. A method that cannot run is a row with the
    reason. out: a folder that keeps the packed models and the finished rows: a later run with the
    same folder goes on where this one ended, and other models, texts or options add to it; without
    it the packed models are temporary, and finished rows are kept in rows_file, if named.
    learned: a file of SpinQuant's rotations, instead of learning them with torch.
    progress(done, total) is called after each layer of a sweep and each evaluation; an exception in
    it cancels. ValueError names the argument that is wrong, or the tensor that is not finite.
    """
    if task_folder is not None and not tasks:
        raise ValueError(f"task_folder: needs tasks, found none with {task_folder}")
    if isinstance(tasks, str):
        raise ValueError(f"tasks: expected a list of names, found {tasks!r}")
    planned = _configs(methods, schemes, weights, clip, group_size, calibration_tokens, seeds,
                       defaults)
    learned_digest = None
    if learned is not None:
        if all(config.method != "spinquant" for config, _ in planned):
            raise ValueError(f"learned: needs method spinquant, not among the methods; "
                             f"found {learned}")
        load_learned(learned)
        learned_digest = hashlib.sha256(Path(learned).read_bytes()).hexdigest()
        planned = [(replace(c, learned=str(learned)) if c.method == "spinquant" else c, default)
                   for c, default in planned]
    checkpoint = load_checkpoint(model)
    checkpoint.require_unquantized()
    seq_len = default_seq_len(checkpoint) if seq_len is None else seq_len
    limit = checkpoint.shape.max_position_embeddings
    if not 2 <= seq_len <= limit:
        raise ValueError(f"seq_len: expected 2 to {limit} tokens, the model's maximum, "
                         f"found {seq_len}")
    read = _read_texts(checkpoint, texts, seq_len, windows)
    samples = {(c.calibration_tokens, c.seed): calibration_windows(checkpoint, c, calibration)
               for c, _ in planned}
    check_outer(checkpoint)
    judge = _Judge(checkpoint, read, seq_len, tasks, task_folder)
    facts = {
        "model": checkpoint.fingerprint, "version": __version__, "seq_len": seq_len,
        "texts": [text.digest for text in read], "tasks": list(tasks),
        "task_folder": _folder_digest(task_folder), "config": None,
    }

    def key_of(config: QuantConfig) -> str:
        tokens = np.ascontiguousarray(samples[config.calibration_tokens, config.seed])
        digest = hashlib.sha256(tokens).hexdigest()
        values = config.to_json()
        if config.learned is not None:  # its content counts, not its name
            values["learned"] = learned_digest
        return _key({**facts, "config": values, "calibration": digest})

    wanted = {key_of(config): config for config, _ in planned}
    with contextlib.ExitStack() as stack:
        if out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="singlequant-")))
        else:
            folder = Path(out)
            folder.mkdir(parents=True, exist_ok=True)
            rows_file = folder / ROWS_FILE if rows_file is None else rows_file
        rows = stack.enter_context(RowsFile(None if rows_file is None else Path(rows_file)))
        run = _Run(checkpoint, judge, rows, folder, out is not None, progress)
        found = run.rows(_key(facts), wanted, samples)
    original, *_ = found.values()
    quantized = [replace(found[key_of(config)], default=default) for config, default in planned]
    return Comparison(
        model=checkpoint.path.resolve().name,
        fingerprint=checkpoint.fingerprint,
        texts=tuple(text.name for text in read),
        seq_len=seq_len,
        calibration="bundled" if calibration is None else str(calibration),
        rows=(original, *quantized),
        machine=machine_info(),
    )


class _Run:
    """Makes and evaluates the rows that are not in the file yet, group by group."""

    def __init__(self, checkpoint: Checkpoint, judge: _Judge, rows: RowsFile, folder: Path,
                 keep: bool, progress: Callable[[int, int], None] | None) -> None:
        self._checkpoint, self._judge, self._rows = checkpoint, judge, rows
        self._folder, self._keep, self._progress = folder, keep, progress
        self._done = self._total = 0
        self._views: dict[tuple, Checkpoint] = {}
        self._memory = _memory()

    def rows(self, original: str, wanted: Mapping[str, QuantConfig],
             samples: Mapping[tuple[int, int], NDArray[np.int64]]) -> dict[str, Row]:
        """All rows by key, the original's first."""
        failed: dict[str, Row] = {}
        groups: dict[tuple[int, tuple[int, int]], dict[str, QuantConfig]] = {}
        views: dict[int, Checkpoint] = {}
        for key, config in wanted.items():
            if key in self._rows.rows:
                continue
            sample = config.calibration_tokens, config.seed
            prepared = _measure(self._view, config, samples[sample])
            if prepared.error:
                failed[key] = Row(config, error=prepared.error)
                continue
            view = prepared.value
            views[id(view)] = view
            groups.setdefault((id(view), sample), {})[key] = config
        missing = sum(map(len, groups.values()))
        self._total = missing + len(groups) * self._checkpoint.shape.layers
        if original not in self._rows.rows:
            self._total += 1
            self._rows.add(original, "row", self._judge.original().to_json())
            self._step()
        for (view, sample), configs in groups.items():
            failed |= self._group(views[view], samples[sample], configs)
        finished = {key: Row.from_json(self._rows.rows[key])
                    for key in (original, *wanted) if key in self._rows.rows}
        return finished | failed

    def _view(self, config: QuantConfig, windows: NDArray[np.int64]) -> Checkpoint:
        """What `prepare` makes of the checkpoint; rows of one method and seed share it."""
        key = config.method, config.seed, config.activation_bits, config.learned
        if key not in self._views:
            self._views[key] = prepare(self._checkpoint, config, windows)
        return self._views[key]

    def _step(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)

    def _group(self, view: Checkpoint, windows: NDArray[np.int64],
               configs: Mapping[str, QuantConfig]) -> dict[str, Row]:
        """Makes and evaluates rows that share statistics; returns those that failed."""
        builds = [_Build(key, config, self._folder / _folder_name(key, config))
                  for key, config in configs.items()]
        fresh = [b for b in builds if not (b.key in self._rows.built and b.out.is_dir())]
        before, held = self._done, _memory() - self._memory
        if fresh:
            _build_together(view, windows, fresh, self._step)
        for _ in range(before + view.shape.layers - self._done):
            self._step()  # layers that nobody needed any more
        for build in fresh:
            if build.error is None:
                self._rows.add(build.key, "built", build.cost(held), durable=self._keep)
        failed = {}
        for build in builds:
            if build.error:
                row = Row(build.config, error=build.error)
            else:
                row = self._judge.quantized(build.out, Row(build.config,
                                                           **self._rows.built[build.key]))
            if row.error:
                failed[build.key] = row
            else:
                self._rows.add(build.key, "row", row.to_json())
            if not self._keep:
                shutil.rmtree(build.out, ignore_errors=True)
            self._step()
        return failed


def _folder_name(key: str, config: QuantConfig) -> str:
    """Of a packed model in OUT: readable, and unlike that of any other row."""
    return f"{config.scheme}-{config.method}-{config.weights}-{key[:12]}"
