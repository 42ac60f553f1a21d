# SPDX-License-Identifier: Apache-2.0
"""Zero-shot tasks through lm-evaluation-harness: its face of a Model, tasks of local files, and
differences of two models question by question.

Nothing here imports lm_eval until a task is run or `SingleQuantLM` is asked for.
"""

from __future__ import annotations

from typing import Any

from .adapter import Adapter, model_class
from .paired import (
    Answers,
    PairedDifference,
    TaskScores,
    differences_json,
    paired_differences,
)
from .run import evaluate_tasks, score_tasks
from .scoring import score_continuations
from .tasks import bundled_tasks

__all__ = [
    "Answers",
    "PairedDifference",
    "SingleQuantLM",  # noqa: F822
    "TaskScores",
    "bundled_tasks",
    "differences_json",
    "evaluate_tasks",
    "paired_differences",
    "score_continuations",
    "score_tasks",
]

_Adapter = Adapter  # its name before the module was a package


def __getattr__(name: str) -> Any:
    if name == "SingleQuantLM":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
