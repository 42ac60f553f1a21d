# SPDX-License-Identifier: Apache-2.0
"""Two models on the same questions: the difference question by question, and its standard error.

Two accuracies on n questions have a standard error each, and most of it is common to both: some
questions are hard for either model. Differences question by question leave it out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Answers:
    """What a model scored on each question of a task.

    questions: sha256 of the questions in their order. values: metric -> a number per question, of
    the metrics that are the mean of such numbers, as acc is and a perplexity is not.
    """

    questions: str
    values: Mapping[str, tuple[float, ...]]

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; from_json() takes it back."""
        return {"questions": self.questions,
                "values": {metric: [int(v) if float(v).is_integer() else v for v in values]
                           for metric, values in self.values.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Answers:
        """The answers of a dict."""
        return cls(values["questions"], {metric: tuple(map(float, found))
                                         for metric, found in values["values"].items()})


@dataclass(frozen=True)
class TaskScores:
    """Metrics as `evaluate_tasks` gives them, and the answers behind them, by task.

    seconds: that a task's requests took, without the reading of its documents. files: written.
    """

    metrics: Mapping[str, Mapping[str, float]]
    answers: Mapping[str, Answers]
    seconds: Mapping[str, float] = field(default_factory=dict)
    files: Sequence[Path] = ()


@dataclass(frozen=True)
class PairedDifference:
    """A metric of two models on the same questions.

    original, quantized: the means. difference: quantized - original, the mean of the differences
    d_i of the questions. stderr: its standard error, sd(d) / sqrt(questions), with questions - 1
    degrees of freedom; None for one question.
    """

    original: float
    quantized: float
    difference: float
    stderr: float | None
    questions: int

    def __str__(self) -> str:
        spread = "" if self.stderr is None else f" +- {self.stderr:.4f}"
        return f"{self.difference:+.4f}{spread}"


def paired_differences(
    quantized: Mapping[str, Answers], original: Mapping[str, Answers]
) -> dict[str, dict[str, PairedDifference]]:
    """task -> metric -> difference, for the tasks and metrics that both models have.

    ValueError for a task whose questions are not the same.
    """
    found: dict[str, dict[str, PairedDifference]] = {}
    for task in (task for task in quantized if task in original):
        ours, theirs = quantized[task], original[task]
        if ours.questions != theirs.questions:
            raise ValueError(f"{task}: expected the same questions for both models, found others")
        found[task] = {metric: _difference(values, theirs.values[metric])
                       for metric, values in ours.values.items() if metric in theirs.values}
    return found


def differences_json(
    found: Mapping[str, Mapping[str, PairedDifference]],
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """What `paired_differences` gives, as values that json.dumps accepts."""
    return {task: {metric: dataclasses.asdict(difference)
                   for metric, difference in metrics.items()} for task, metrics in found.items()}


def _difference(quantized: Iterable[float], original: Iterable[float]) -> PairedDifference:
    ours, theirs = np.array([*quantized], np.float64), np.array([*original], np.float64)
    d, n = ours - theirs, len(ours)
    stderr = float(d.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return PairedDifference(float(theirs.mean()), float(ours.mean()), float(d.mean()), stderr, n)


def answers_of(samples: Iterable[Mapping[str, Any]], metrics: Mapping[str, float]) -> Answers:
    """The answers of one task's samples, as lm-evaluation-harness logs them.

    metrics: the task's, by `metric_name`. Of a sample's numbers those count whose mean is the
    metric.
    """
    values: dict[str, dict[int, float]] = {}
    hashes: dict[int, str] = {}
    for sample in samples:
        hashes[sample["doc_id"]] = sample["doc_hash"]
        for metric in sample["metrics"]:
            if isinstance(sample[metric], (bool, int, float, np.number, np.bool_)):
                name = metric_name(f"{metric},{sample['filter']}")
                values.setdefault(name, {})[sample["doc_id"]] = float(sample[metric])
    order = sorted(hashes)
    digest = hashlib.sha256("\n".join(hashes[doc] for doc in order).encode()).hexdigest()
    whole = {name: tuple(found[doc] for doc in order) for name, found in values.items()
             if len(found) == len(order) and all(map(math.isfinite, found.values()))}
    return Answers(digest, {name: found for name, found in whole.items()
                            if math.isclose(np.mean(found), metrics.get(name, math.nan),
                                            rel_tol=1e-9, abs_tol=1e-12)})


def metric_name(key: str) -> str:
    """'acc,none' -> 'acc'; a filter other than none stays in the name."""
    return key.removesuffix(",none")
