# SPDX-License-Identifier: Apache-2.0
"""Zero-shot tasks run by lm-evaluation-harness on a Model."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.model import Model
from .adapter import model_class, require_lm_eval
from .paired import TaskScores, answers_of, metric_name
from .results import ResultsFolder
from .tasks import bundled_tasks, defined_name, is_local, local_configs, write_view

BOOTSTRAP_ITERATIONS = 1000  # for the few metrics without a closed-form standard error


def evaluate_tasks(
    model: Model,
    tasks: Sequence[str],
    task_folder: str | Path | None = None,
    limit: int | None = None,
    progress: bool = False,
    output: str | Path | None = None,
    log_samples: bool = False,
) -> dict[str, dict[str, float]]:
    """Zero-shot metrics of lm-evaluation-harness: task -> metric -> value.

    A metric's standard error is the metric `NAME_stderr`. Tasks are, in this order, those of the
    YAML files under task_folder, the package's own (`stdlib_continuation`, `stdlib_perplexity`)
    and the harness's. Local tasks touch neither the network nor the user's caches; data_files are
    relative to the YAML file that names them. limit: documents per task. output: also write the
    harness's own results file there, as its --output_path does, and with log_samples the answer to
    each question, as --log_samples does. ValueError for an unknown task, ImportError without
    lm_eval.
    """
    folder = None if output is None else ResultsFolder(output, log_samples)
    return _run(model, tasks, task_folder, limit, progress, folder, by_question=log_samples).metrics


def score_tasks(
    model: Model,
    tasks: Sequence[str],
    task_folder: str | Path | None = None,
    limit: int | None = None,
    progress: bool = False,
    output: str | Path | None = None,
    log_samples: bool = False,
) -> TaskScores:
    """`evaluate_tasks`, and what the model scored on each question, for `paired_differences`."""
    folder = None if output is None else ResultsFolder(output, log_samples)
    return _run(model, tasks, task_folder, limit, progress, folder, by_question=True)


def _run(
    model: Model, tasks: Sequence[str], task_folder: str | Path | None, limit: int | None,
    progress: bool, folder: ResultsFolder | None, by_question: bool,
) -> TaskScores:
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    with found_tasks(tasks, task_folder, progress) as manager:
        return _scores(model, list(tasks), manager, limit, progress, folder, by_question)


@contextlib.contextmanager
def found_tasks(
    tasks: Sequence[str], task_folder: str | Path | None = None, progress: bool = False
) -> Iterator[Any]:
    """lm_eval's TaskManager of the tasks that `evaluate_tasks` names, while the harness is quiet.

    ValueError for a task that there is not, ImportError without lm_eval.
    """
    require_lm_eval()
    if not tasks:
        raise ValueError("tasks: expected at least one, got none")
    if task_folder is not None and not Path(task_folder).is_dir():
        raise ValueError(f"task_folder: expected a folder, got {task_folder}")
    folders = [bundled_tasks()] + ([] if task_folder is None else [Path(task_folder)])
    configs = local_configs(folders)
    with tempfile.TemporaryDirectory(prefix="singlequant-tasks-") as work, _quiet(progress):
        yield _task_manager(list(tasks), configs, Path(work))


def _task_manager(tasks: list[str], configs: dict[Path, dict[str, Any]], work: Path) -> Any:
    """lm_eval's TaskManager that finds the tasks. ValueError for one that it does not know."""
    from lm_eval.tasks import TaskManager

    write_view(work, configs)
    local = {defined_name(config): config for config in configs.values()}
    # reading the harness's own thousands of files takes seconds: only if one may be asked for
    alone = all(is_local(task, local) for task in tasks)
    manager = TaskManager(include_path=str(work), include_defaults=not alone)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"tasks: expected names of lm-evaluation-harness or local ones "
                         f"({', '.join(sorted(local))}), got {', '.join(unknown)}")
    return manager


def _scores(
    model: Model, tasks: list[str], manager: Any, limit: int | None, progress: bool,
    folder: ResultsFolder | None, by_question: bool,
) -> TaskScores:
    import lm_eval

    tracker = folder.begin() if folder else None
    adapter = model_class()(model, progress=progress)
    results = lm_eval.simple_evaluate(
        model=adapter, tasks=tasks, task_manager=manager, limit=limit,
        bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=by_question,
    )
    metrics = {task: _numbers(values) for task, values in results["results"].items()}
    samples = results["samples"] if by_question else {}
    answers = {task: answers_of(found, metrics.get(task, {})) for task, found in samples.items()}
    files = folder.save(tracker, results, str(model.checkpoint.path)) if folder else []
    return TaskScores(metrics, answers, dict(adapter.seconds), files)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """'acc,none': 0.5 -> 'acc': 0.5, as `metric_name` has it."""
    return {
        metric_name(key): float(value)
        for key, value in metrics.items()
        if "," in key and isinstance(value, (int, float, np.number))
    }


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keeps from the user what the harness says of its own work.

    That is what it prints, log lines where nobody set up logging, what `git` says of a working
    directory that is no repository, and, without progress, bars.
    """
    import lm_eval.api.task
    import lm_eval.evaluator
    import tqdm
    from datasets.utils import logging as bars

    logger, silence = logging.getLogger("lm_eval"), logging.NullHandler()
    with contextlib.ExitStack() as stack:

        def replace(module: Any, name: str, value: Any) -> None:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)

        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        logger.addHandler(silence)
        stack.callback(logger.removeHandler, silence)
        replace(lm_eval.evaluator, "get_git_commit_hash", lambda: None)
        if not progress:
            hidden = functools.partial(tqdm.tqdm, disable=True)
            replace(tqdm, "tqdm", hidden)
            replace(lm_eval.api.task, "tqdm", hidden)
            if bars.is_progress_bar_enabled():
                bars.disable_progress_bar()
                stack.callback(bars.enable_progress_bar)
        yield
