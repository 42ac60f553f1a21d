"""Rotations of an experiment's own on one model: one sweep for all of them, finished ones kept."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import singlequant as sq
from singlequant.export.writer import ModelWriter
from singlequant.harness import evaluate_tasks
from singlequant.rotations import LayerRotations
from singlequant.runtime.model import Model
from singlequant.statistics import LayerStatistics
from singlequant.study.compare import Row, RowsFile
from singlequant.study.evaluate import CachedScorer, default_seq_len, split_windows
from singlequant.sweep.layer import quantize_layer

ORIGINAL = "original"


@dataclass(frozen=True)
class Trial:
    """A way to solve a layer. facts: JSON values that, with config, say all that solve does."""

    name: str
    config: sq.QuantConfig
    solve: Callable[[LayerStatistics], LayerRotations]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Laboratory:
    """One model, the text it is judged on and the tokens it is calibrated on."""

    def __init__(
        self,
        model: Path,
        text: str,
        calibration: Path | None,
        rows_file: Path,
        *,
        seq_len: int | None = None,
        windows: int | None = None,
        tasks: Sequence[str] = (),
        task_folder: Path | None = None,
    ) -> None:
        self.checkpoint = sq.load_checkpoint(model)
        self.checkpoint.require_unquantized()
        self.seq_len = seq_len or default_seq_len(self.checkpoint)
        self.tokens = split_windows(self.checkpoint.encode(text), self.seq_len)[:windows].ravel()
        self.tasks, self.task_folder = list(tasks), task_folder
        self._calibration, self._rows_file = calibration, rows_file
        self._original = CachedScorer(Model(self.checkpoint))

    @property
    def scores_tasks(self) -> bool:
        """Whether tasks can be run here."""
        return importlib.util.find_spec("lm_eval") is not None

    def run(
        self, trials: Sequence[Trial], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Row]:
        """name -> Row of each trial, and of the original. Trials share config's tokens and seed.

        Rows found in the file are taken from there. ValueError for trials that do not share.
        """
        first, *_ = trials
        for trial in trials:
            if any(getattr(trial.config, name) != getattr(first.config, name)
                   for name in ("calibration_tokens", "seed")):
                raise ValueError("trials: expected the same calibration_tokens and seed in all")
        windows = sq.calibration_windows(self.checkpoint, first.config, self._calibration)
        keys = {trial.name: self._key(windows, trial.config.to_json(), trial.facts)
                for trial in trials}
        keys[ORIGINAL] = self._key(None, None, {})
        done = 0
        with RowsFile(self._rows_file) as rows:
            missing = list({self._name(keys[trial.name]): trial for trial in trials
                            if self._find(rows, keys[trial.name]) is None}.values())
            fresh_original = self._find(rows, keys[ORIGINAL]) is None
            total = len(missing) * (self.checkpoint.spec.layers + 1) + fresh_original

            def step(count: int) -> None:
                nonlocal done
                done += count
                if progress:
                    progress(done, total)

            if fresh_original:
                row = self._judge(self._original.model, Row(None))
                rows.add(self._name(keys[ORIGINAL]), "row", row.to_json())
                step(1)
            with tempfile.TemporaryDirectory(prefix="singlequant-") as folder:
                for trial, row, out in self._build(missing, windows, Path(folder), step):
                    row = self._judge(sq.load(out), row)
                    rows.add(self._name(keys[trial.name]), "row", row.to_json())
                    step(1)
            return {name: Row.from_json(self._find(rows, key)) for name, key in keys.items()}

    # A row with task scores serves a run that cannot make them; never the other way round.

    def _find(self, rows: RowsFile, key: dict[bool, str]) -> dict[str, Any] | None:
        found = rows.rows.get(key[True])
        return found if found or self.scores_tasks else rows.rows.get(key[False])

    def _name(self, key: dict[bool, str]) -> str:
        return key[self.scores_tasks]

    def _key(self, windows: NDArray[np.int64] | None, config: dict[str, Any] | None,
             facts: Mapping[str, Any]) -> dict[bool, str]:
        """The key of a row with and without the scores of tasks."""
        whole = {
            "model": self.checkpoint.fingerprint, "version": sq.__version__,
            "seq_len": self.seq_len, "text": _digest(self.tokens),
            "calibration": None if windows is None else _digest(windows),
            "config": config, "facts": dict(facts),
        }
        return {scored: hashlib.sha256(json.dumps(
            {**whole, "tasks": self.tasks if scored else []}, sort_keys=True).encode()).hexdigest()
            for scored in (False, True)}

    def _build(
        self, trials: Sequence[Trial], windows: NDArray[np.int64], folder: Path,
        step: Callable[[int], None],
    ) -> Iterator[tuple[Trial, Row, Path]]:
        """Quantize the model in all ways, one layer in memory at a time, then yield each."""
        solve_seconds, quantize_seconds = dict.fromkeys(range(len(trials)), 0.0), {}
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(ModelWriter(folder / str(i), self.checkpoint, trial.config))
                for i, trial in enumerate(trials)
            ]
            for layer in self._statistics(trials, windows):
                for i, (trial, writer) in enumerate(zip(trials, writers, strict=True)):
                    start = time.perf_counter()
                    rotations = replace(trial.solve(layer), statistics=layer)
                    solved = time.perf_counter()
                    writer.write_layer(quantize_layer(self.checkpoint, rotations, trial.config))
                    solve_seconds[i] += solved - start
                    quantize_seconds[i] = (quantize_seconds.get(i, 0.0)
                                           + time.perf_counter() - solved)
                    step(1)
            for writer in writers:
                writer.finish()
        for i, trial in enumerate(trials):
            seconds = {"solve": solve_seconds[i], "quantize": quantize_seconds[i]}
            yield trial, Row(trial.config, seconds=seconds), folder / str(i)

    def _statistics(
        self, trials: Sequence[Trial], windows: NDArray[np.int64]
    ) -> Iterable[LayerStatistics]:
        """Layer by layer; with the inputs where a rounding wants them."""
        if not trials:
            return ()
        keep = any(trial.config.weights == "gptq" for trial in trials)
        return sq.calibrate(self.checkpoint, windows, keep_inputs=keep)

    def _judge(self, model: Model, row: Row) -> Row:
        start = time.perf_counter()
        result = sq.evaluate(model, self.tokens, self.seq_len, self._original)
        tasks = {}
        if self.tasks and self.scores_tasks:
            tasks = evaluate_tasks(model, self.tasks, self.task_folder)
            tasks = {task: {metric: float(value) for metric, value in values.items()}
                     for task, values in tasks.items()}
        return replace(row, results=(result,), tasks=tasks,
                       seconds={**row.seconds, "evaluate": time.perf_counter() - start})


def _digest(tokens: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()
