"""The laboratory of the experiments: one model, its tokens, one judge.

A `Trial` is a way to quantize. `Laboratory.run` hands all trials to the package's sweep, which
makes their packed folders from one run over the calibration tokens, judges each folder, and keeps
finished rows. `Laboratory.judge` gives any model's divergence from the original.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import singlequant as sq
from singlequant.harness import evaluate_tasks
from singlequant.runtime.model import Model
from singlequant.study.compare import Row, RowsFile
from singlequant.study.evaluate import CachedScorer, Scorer, default_seq_len, split_windows
from singlequant.sweep.sweep import Job, Solve, sweep
from singlequant.sweep.texts import token_digest

ORIGINAL = "original"


@dataclass(frozen=True)
class Trial:
    """A way to quantize the model.

    solve(statistics) replaces the solver of config.method. facts: JSON values that, with config,
    say all that solve does.
    """

    name: str
    config: sq.QuantConfig
    solve: Solve | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Laboratory:
    """One model, the tokens it is judged on and the text it is calibrated on.

    windows: of seq_len tokens each, None for all of the text. rows_file: where `run` keeps finished
    rows.
    """

    def __init__(
        self,
        model: Path,
        text: str,
        calibration: Path | None,
        rows_file: Path | None = None,
        *,
        seq_len: int | None = None,
        windows: int | None = None,
        tasks: Sequence[str] = (),
        task_folder: Path | None = None,
    ) -> None:
        self.checkpoint = sq.load_checkpoint(model)
        self.checkpoint.require_unquantized()
        self.seq_len = seq_len or default_seq_len(self.checkpoint)
        self.windows = split_windows(self.checkpoint.encode(text), self.seq_len)[:windows]
        self.tokens = self.windows.ravel()
        self.tasks, self.task_folder = list(tasks), task_folder
        self._calibration, self._rows_file = calibration, rows_file
        self.original = CachedScorer(Model(self.checkpoint))

    def calibration_windows(self, config: sq.QuantConfig) -> NDArray[np.int64]:
        """Calibration tokens [count, length] as config asks for them."""
        return sq.calibration_windows(self.checkpoint, config, self._calibration)

    @property
    def scores_tasks(self) -> bool:
        """Whether tasks can be run here."""
        return importlib.util.find_spec("lm_eval") is not None

    def run(
        self, trials: Sequence[Trial], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Row]:
        """name -> Row of each trial, and of the original. Trials share one sample.

        Rows found in the file are taken from there. ValueError for trials that do not share.
        """
        first, *_ = trials
        for trial in trials:
            if trial.config.sample != first.config.sample:
                raise ValueError("trials: expected the same calibration windows in all")
        windows = self.calibration_windows(first.config)
        keys = {trial.name: self._key(windows, trial.config.to_json(), trial.facts)
                for trial in trials}
        keys[ORIGINAL] = self._key(None, None, {})
        done = 0
        with RowsFile(self._rows_file) as rows:
            missing = list({self._name(keys[trial.name]): trial for trial in trials
                            if self._find(rows, keys[trial.name]) is None}.values())
            fresh_original = self._find(rows, keys[ORIGINAL]) is None
            layers = self.checkpoint.spec.layers if missing else 0
            total = layers + len(missing) + fresh_original

            def step(*_: int) -> None:
                nonlocal done
                done += 1
                if progress:
                    progress(done, total)

            if fresh_original:
                row = self._row(self.original.model, Row(None))
                rows.add(self._name(keys[ORIGINAL]), "row", row.to_json())
                step()
            with tempfile.TemporaryDirectory(prefix="singlequant-") as folder:
                for trial, row, out in self._build(missing, windows, Path(folder), step):
                    row = self._row(sq.load(out), row)
                    rows.add(self._name(keys[trial.name]), "row", row.to_json())
                    step()
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
            "seq_len": self.seq_len, "text": token_digest(self.tokens),
            "calibration": None if windows is None else token_digest(windows),
            "config": config, "facts": dict(facts),
        }
        return {scored: hashlib.sha256(json.dumps(
            {**whole, "tasks": self.tasks if scored else []}, sort_keys=True).encode()).hexdigest()
            for scored in (False, True)}

    def _build(
        self, trials: Sequence[Trial], windows: NDArray[np.int64], folder: Path,
        step: Callable[[int, int], None],
    ) -> Iterator[tuple[Trial, Row, Path]]:
        """Quantize the model in all ways at once, then yield each trial, its row and its folder."""
        jobs = [Job(trial.config, folder / str(i), scratch=True, solve=trial.solve)
                for i, trial in enumerate(trials)]
        outcomes = sweep(self.checkpoint, windows, jobs, progress=step) if jobs else ()
        for trial, job, outcome in zip(trials, jobs, outcomes, strict=True):
            yield trial, Row(trial.config, seconds=outcome.seconds), job.out

    def judge(self, model: Scorer) -> sq.Evaluation:
        """Perplexity on the laboratory's tokens, and the divergence from the original."""
        return sq.evaluate(model, self.tokens, self.seq_len, self.original)

    def _row(self, model: Model, row: Row) -> Row:
        start = time.perf_counter()
        result = self.judge(model)
        tasks = {}
        if self.tasks and self.scores_tasks:
            tasks = evaluate_tasks(model, self.tasks, self.task_folder)
            tasks = {task: {metric: float(value) for metric, value in values.items()}
                     for task, values in tasks.items()}
        return replace(row, results=(result,), tasks=tasks,
                       seconds={**row.seconds, "evaluate": time.perf_counter() - start})
