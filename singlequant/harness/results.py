# SPDX-License-Identifier: Apache-2.0
"""The results file of lm-evaluation-harness: its own tracker writes it, as --output_path does."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..files import write_file

SUFFIX = ".json"  # of an output that names a file: the harness puts the date behind its stem


class ResultsFolder:
    """Where the results of runs go; made before long work, so that a bad name is an early error.

    output: a folder, in which each model has one, or a name that ends in .json. log_samples:
    whether the answers to the questions are written, too, as --log_samples does. ValueError when
    output is a file.
    """

    def __init__(self, output: str | Path, log_samples: bool) -> None:
        self.log_samples = log_samples
        self._output = Path(output)
        named = self._output.suffix == SUFFIX
        self._root = self._output.parent if named else self._output
        if self._root.exists() and not self._root.is_dir():
            raise ValueError(f"output: expected a folder, or a name that ends in {SUFFIX}, found "
                             f"the file {self._root}")
        self._root.mkdir(parents=True, exist_ok=True)
        self._name = self._output.name if named else ""

    def begin(self) -> Any:
        """The harness's tracker of a run, whose clock starts now."""
        from lm_eval.loggers import EvaluationTracker

        return EvaluationTracker()

    def save(self, tracker: Any, results: dict[str, Any], model: str) -> list[Path]:
        """Write a run's results, which the harness returned; the files, that of the results last.

        model: the packed folder. Each file appears only when it is whole. OSError when the harness
        could not write it.
        """
        samples = results.pop("samples", None) if self.log_samples else None
        kept = {key: value for key, value in results.items() if key != "samples"}
        named = {"path": model}
        kept["config"] = {**kept["config"], "model": "singlequant", "model_args": named}
        tracker.general_config_tracker.log_experiment_args("singlequant", named, None, None, True)
        with tempfile.TemporaryDirectory(prefix="singlequant-results-") as work:
            tracker.output_path = str(Path(work, self._name))
            tracker.save_results_aggregated(results=kept, samples=samples)
            for task, answers in (samples or {}).items():
                tracker.save_results_samples(task_name=task, samples=answers)
            return self._moved(Path(work), 1 + len(samples or {}))

    def _moved(self, work: Path, expected: int) -> list[Path]:
        """The files that the tracker left in work, under their final names."""
        found = sorted(path for path in work.rglob("*") if path.is_file())
        if len(found) != expected:  # it logs its errors, and goes on
            raise OSError(f"{self._output}: expected {expected} files of lm-evaluation-harness, "
                          f"which wrote {len(found)}")
        found.sort(key=lambda path: path.suffix == SUFFIX)  # samples are .jsonl
        targets = [self._root / path.relative_to(work) for path in found]
        for path, target in zip(found, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, path.read_bytes())
        return targets
