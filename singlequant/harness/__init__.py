# SPDX-License-Identifier: Apache-2.0
"""Zero-shot tasks through lm-evaluation-harness: its face of a Model, and tasks of local files.

Nothing here imports lm_eval until a task is run or `SingleQuantLM` is asked for.
"""

from __future__ import annotations

from typing import Any

from .adapter import Adapter, model_class
from .run import evaluate_tasks
from .scoring import score_continuations
from .tasks import bundled_tasks

__all__ = ["SingleQuantLM", "bundled_tasks", "evaluate_tasks", "score_continuations"]  # noqa: F822

_Adapter = Adapter  # its name before the module was a package


def __getattr__(name: str) -> Any:
    if name == "SingleQuantLM":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
