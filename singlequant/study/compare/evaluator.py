# SPDX-License-Identifier: Apache-2.0
"""The texts and tasks of a comparison, and what each model scores on them."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ... import harness
from ...checkpoint.folder import Checkpoint, load_checkpoint
from ...distributed import Call, Workers
from ...runtime.model import Model, loaded
from ...sweep.measure import Measured, measure, reason
from ...sweep.text_file import first_tokens
from ...sweep.texts import bundled_path, token_digest
from ..evaluate import (
    CachedScorer,
    Evaluation,
    evaluate,
    evaluation_of,
    group_step,
    score_windows,
    split_windows,
)
from .rows import Row

# What a method may fail with on a model that suits others; anything else ends the comparison.
FAILURES = (ValueError, ArithmeticError, RuntimeError, ImportError, MemoryError)


Spread = tuple[Evaluation, ...] | str  # of a row's texts, or why there are none


def _score_group(
    checkpoint: Checkpoint, original: CachedScorer, windows: NDArray[np.int64]
) -> Measured:
    """What a worker does: the scores of a row's model on a group of windows."""
    return measure(lambda: score_windows(loaded(checkpoint), original, windows), failures=FAILURES)


@dataclass(frozen=True)
class Text:
    """A text to evaluate on: its name in the table and its windows' tokens [count * seq_len]."""

    name: str
    tokens: NDArray[np.int64]

    @property
    def digest(self) -> str:
        """sha256 of the tokens."""
        return token_digest(self.tokens)


def read_texts(
    checkpoint: Checkpoint, files: Sequence[str | Path] | None, seq_len: int, windows: int | None
) -> list[Text]:
    """The texts' first windows. ValueError names the file that is empty or too short."""
    if files is None:
        sources = {"heldout": ("bundled text", bundled_path("heldout"))}
    else:
        paths = [Path(file) for file in dict.fromkeys(map(str, files))]
        alike = len({path.stem for path in paths}) < len(paths)
        sources = {str(p) if alike else p.stem: (str(p), p) for p in paths}
    texts = []
    for name, (source, path) in sources.items():
        tokens = first_tokens(checkpoint.encode, path, None if windows is None
                              else windows * seq_len)
        try:
            whole = split_windows(tokens, seq_len)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        texts.append(Text(name, whole.reshape(-1)))
    return texts


def folder_digest(folder: str | Path | None) -> str | None:
    """sha256 of a folder's files and their names."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Evaluator:
    """Evaluates models on the texts and tasks; the original runs once for all of them."""

    def __init__(self, checkpoint: Checkpoint, texts: Sequence[Text], seq_len: int,
                 tasks: Sequence[str], task_folder: str | Path | None) -> None:
        self._checkpoint, self._texts, self._seq_len = checkpoint, texts, seq_len
        self._tasks, self._task_folder = tasks, task_folder

    @functools.cached_property
    def _original(self) -> CachedScorer:
        return CachedScorer(Model(self._checkpoint))

    def original(self, workers: Workers | None = None) -> Row:
        """The original's row: its divergence from itself is 0."""
        start = time.perf_counter()
        more = () if workers is None else (None, None, workers)
        results = [evaluate(self._original, text.tokens, self._seq_len, *more)
                   for text in self._texts]
        results = [replace(r, kl_mean=0.0, kl_p99=0.0, top1_agreement=1.0,
                           reference_perplexity=r.perplexity) for r in results]
        scores = self._scores(self._original.model)
        return Row(None, results=tuple(results), tasks=scores.metrics, answers=scores.answers,
                   seconds={"evaluate": time.perf_counter() - start},
                   bytes_on_disk=self._checkpoint.bytes_with_tokenizer)

    def quantized(
        self, folder: Path, row: Row, original: Row, results: Spread | None = None
    ) -> Row:
        """The row with a packed folder's scores; with the reason when it cannot be run.

        original: the original's row, whose answers those to tasks are paired with. results: of
        `spread`, where workers scored the folder on the texts.
        """
        start = time.perf_counter()
        if isinstance(results, str):
            return replace(row, error=results)
        before = sum(result.seconds for result in results or ())
        try:
            scores = harness.TaskScores({}, {})
            if results is None or self._tasks:
                model = Model(load_checkpoint(folder))
                results = results or tuple(
                    evaluate(model, text.tokens, self._seq_len, self._original)
                    for text in self._texts)
                scores = self._scores(model)
            paired = harness.paired_differences(scores.answers, original.answers)
        except FAILURES as error:
            return replace(row, error=reason(error))
        seconds = {**row.seconds, "evaluate": before + time.perf_counter() - start}
        return replace(row, results=results, tasks=scores.metrics, paired=paired, seconds=seconds)

    def spread(self, folders: Sequence[Path], workers: Workers) -> dict[Path, Spread]:
        """What `quantized` takes as results, by folder: the groups of windows of all folders and
        texts go to the workers at once."""
        step = group_step(self._seq_len)
        texts = [split_windows(text.tokens, self._seq_len) for text in self._texts]
        found: dict[tuple[int, int, int], Measured] = {}

        def scored(key: tuple[int, int, int], measured: Measured) -> tuple[()]:
            found[key] = measured
            return ()

        calls = [
            Call(_score_group, (checkpoint, self._original, windows[first : first + step]), key,
                 functools.partial(scored, key))
            for f, checkpoint in enumerate(map(load_checkpoint, folders))
            for t, windows in enumerate(texts)
            for first in range(0, len(windows), step)
            for key in [(f, t, first)]]
        workers.run(calls)
        return {folder: self._together(texts, {key[1:]: measured for key, measured in found.items()
                                               if key[0] == f})
                for f, folder in enumerate(folders)}

    @staticmethod
    def _together(
        texts: Sequence[NDArray[np.int64]], found: Mapping[tuple[int, int], Measured]
    ) -> Spread:
        """The evaluation of each text from its groups, in their order; or why there is none."""
        errors = [found[key].error for key in sorted(found)]
        if any(errors):
            return next(error for error in errors if error)
        return tuple(
            evaluation_of([found[key].value for key in sorted(found) if key[0] == t], windows,
                          sum(m.seconds for key, m in found.items() if key[0] == t))
            for t, windows in enumerate(texts))

    def _scores(self, model: Model) -> harness.TaskScores:
        """Metrics of the tasks, and the answers."""
        if not self._tasks:
            return harness.TaskScores({}, {})
        found = harness.score_tasks(model, list(self._tasks), self._task_folder)
        metrics = {task: {metric: float(value) for metric, value in values.items()
                          if isinstance(value, (int, float))}
                   for task, values in found.metrics.items()}
        return replace(found, metrics=metrics)
