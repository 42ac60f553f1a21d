# SPDX-License-Identifier: Apache-2.0
"""The command `eval`: perplexity and zero-shot accuracy."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .shared import (
    add_command,
    add_dequantize,
    add_kv_bits,
    add_workers,
    names,
    opened_workers,
    progress_bar,
    some_path,
)

if TYPE_CHECKING:
    from ..harness import PairedDifference, TaskScores


def add(commands) -> None:
    """Add the command to the parser's."""
    c = add_command(commands, "eval", run,
                     "Perplexity and zero-shot accuracy of a folder, quantized or not.")
    c.add_argument("model", metavar="MODEL_OR_OUT", type=some_path)
    c.add_argument("--text", type=some_path, metavar="FILE", help="perplexity on this text")
    c.add_argument("--seq-len", type=int, metavar="N",
                   help="tokens of a window (default: the model's maximum, 2048 at most)")
    c.add_argument("--windows", type=int, metavar="N",
                   help="the first N windows of the text (default: all)")
    c.add_argument("--reference", type=some_path, metavar="MODEL",
                   help="also print the divergence from this model on the text")
    c.add_argument("--tasks", metavar="A,B",
                   help="zero-shot tasks: the package's own (stdlib_continuation, "
                        "stdlib_perplexity), those in --task-folder, and lm-evaluation-harness's; "
                        "needs pip install 'singlequant[evaluation]'")
    c.add_argument("--task-folder", type=some_path, metavar="DIR",
                   help="YAML task files of your own, with local data")
    c.add_argument("--against", type=some_path, metavar="MODEL",
                   help="also run the tasks on this model, and print the difference from it, "
                        "question by question, with its standard error")
    c.add_argument("--limit", type=int, metavar="N", help="documents per task (default: all)")
    c.add_argument("--output", type=some_path, metavar="DIR",
                   help="write lm-evaluation-harness's own results file there, as lm_eval's "
                        "--output_path does")
    c.add_argument("--log-samples", action="store_true", default=None,
                   help="with --output: also the answer to each question, as lm_eval does")
    add_kv_bits(c)
    add_workers(c)
    add_dequantize(c)
    c.add_argument("--json", action="store_true", help="print JSON alone")


def run(arguments: argparse.Namespace) -> None:
    """What the parsed command line asks for."""
    from ..files import json_text
    from ..runtime.open import load
    from ..study.evaluate import LogitsError

    check_eval(arguments)
    model = load(arguments.model, arguments.kv_bits, arguments.dequantize)
    try:
        result = evaluate_text(model, arguments) if arguments.text else None
    except LogitsError as error:
        if arguments.json:
            print(json_text({"kv_bits": model.kv_bits, "perplexity": None,
                             "perplexity_reason": str(error)}))
        raise
    tasks = None if arguments.tasks is None else score_named_tasks(model, arguments)
    if arguments.json:
        printed = {"kv_bits": model.kv_bits} | (result.to_json() if result else {})
        print(json_text(printed | (tasks.to_json() if tasks else {})))
        return
    print(f"kv_bits         {model.kv_bits}")
    if result:
        print_evaluation(result)
    if tasks:
        tasks.print()


@dataclasses.dataclass(frozen=True)
class NamedTasks:
    """The scores of --tasks, those of --against or None, and the paired differences."""

    found: TaskScores
    original: TaskScores | None
    paired: Mapping[str, Mapping[str, PairedDifference]]

    @property
    def files(self) -> list[Path]:
        """What was written."""
        return [*self.found.files, *(self.original.files if self.original else ())]

    def to_json(self) -> dict[str, Any]:
        """What --json prints of them."""
        from ..harness import differences_json

        printed: dict[str, Any] = {"tasks": with_seconds(self.found)}
        if self.original is not None:
            printed |= {"original": with_seconds(self.original),
                        "paired": differences_json(self.paired)}
        return printed | ({"files": [str(path) for path in self.files]} if self.files else {})

    def print(self) -> None:
        """A line per metric, one for the seconds of a task, and the files."""
        others = self.original.metrics if self.original else {}
        for task, metrics in self.found.metrics.items():
            print_task(task, metrics, others.get(task, {}), self.paired.get(task, {}))
            if task in self.found.seconds:
                print(f"{task:<24} {'seconds':<16} {self.found.seconds[task]:.1f}")
        for path in self.files:
            print(f"wrote           {path}")


def with_seconds(scores: TaskScores) -> dict[str, dict[str, float]]:
    """Metrics by task, the seconds that a task's requests took among them."""
    return {task: {**metrics, **({"seconds": scores.seconds[task]} if task in scores.seconds
                                 else {})} for task, metrics in scores.metrics.items()}


def print_task(task: str, metrics, original, paired) -> None:
    """A line per metric: its value, the original's, and the paired difference of the two."""
    from ..files import not_finite

    def shown(value: float) -> str:
        return not_finite(value) or f"{value:.4f}"

    for name, value in metrics.items():
        if "_stderr" in name:
            continue
        error = metrics.get(stderr_name(name))
        spread = "" if error is None else f" +- {shown(error)}"
        line = f"{task:<24} {name:<16} {shown(value)}{spread}"
        if name in original:
            line += f"  original {shown(original[name])}"
        if name in paired:
            line += f"  difference {paired[name]} ({paired[name].questions} questions, paired)"
        print(line)


def check_eval(arguments: argparse.Namespace) -> None:
    """ValueError for options that need another one."""
    if arguments.text is None and arguments.tasks is None:
        raise ValueError("eval: expected --text FILE, --tasks A,B or both")
    needs = {"--reference": ("--text", arguments.reference, arguments.text),
             "--seq-len": ("--text", arguments.seq_len, arguments.text),
             "--windows": ("--text", arguments.windows, arguments.text),
             "--executor": ("--text", arguments.executor, arguments.text),
             "--task-folder": ("--tasks", arguments.task_folder, arguments.tasks),
             "--against": ("--tasks", arguments.against, arguments.tasks),
             "--limit": ("--tasks", arguments.limit, arguments.tasks),
             "--output": ("--tasks", arguments.output, arguments.tasks),
             "--log-samples": ("--output", arguments.log_samples, arguments.output)}
    for option, (needed, given, there) in needs.items():
        if given is not None and there is None:
            raise ValueError(f"{option}: needs {needed}")
    if arguments.windows is not None and arguments.windows < 1:
        raise ValueError(f"--windows: expected at least 1, found {arguments.windows}")


def evaluate_text(model, arguments: argparse.Namespace):
    """Perplexity, and divergence from --reference, on --text: an Evaluation."""
    from ..runtime.open import load
    from ..study.evaluate import default_seq_len, perplexity, split_windows
    from ..sweep.text_file import first_tokens

    reference = None
    if arguments.reference:
        reference = load(arguments.reference, dequantize=arguments.dequantize)
    limit = model.spec.max_position_embeddings
    if arguments.seq_len and arguments.seq_len > limit:
        print(f"singlequant: warning: --seq-len {arguments.seq_len} is beyond the model's "
              f"max_position_embeddings, {limit}", file=sys.stderr)
    seq_len = default_seq_len(model) if arguments.seq_len is None else arguments.seq_len
    count = None if arguments.windows is None else arguments.windows * seq_len
    tokens = first_tokens(model.encode, arguments.text, count)
    try:  # what is wrong with the text is said under its file's name
        split_windows(tokens, seq_len)
    except ValueError as error:
        raise ValueError(f"{arguments.text}: {error}") from None
    with opened_workers(arguments) as workers, progress_bar("evaluating", "window") as update:
        return perplexity(model, tokens, seq_len, reference, update, workers)


def print_evaluation(result) -> None:
    from ..study.evaluate import perplexity_text

    print(f"perplexity      {perplexity_text(result.perplexity)}  ({result.predictions} "
          f"predictions in windows of {result.seq_len}, {result.seconds:.1f} s)")
    if result.kl_mean is not None:
        print(f"reference       {perplexity_text(result.reference_perplexity)}")
        print(f"kl_mean         {result.kl_mean:.5f} nats per token from the reference")
        print(f"kl_p99          {result.kl_p99:.5f}")
        print(f"top1_agreement  {result.top1_agreement:.4f}")


def score_named_tasks(model, arguments: argparse.Namespace) -> NamedTasks:
    """--tasks run on the model, and on --against."""
    from .. import harness
    from ..runtime.open import load

    how = (names(arguments.tasks), arguments.task_folder, arguments.limit, sys.stderr.isatty(),
           arguments.output, bool(arguments.log_samples))
    if arguments.against is None:
        return NamedTasks(harness.score_tasks(model, *how), None, {})
    original = load(arguments.against, dequantize=arguments.dequantize)
    found, expected = (harness.score_tasks(scored, *how) for scored in (model, original))
    return NamedTasks(found, expected,
                      harness.paired_differences(found.answers, expected.answers))


def stderr_name(metric: str) -> str:
    """'acc' -> 'acc_stderr', 'exact_match,strict' -> 'exact_match_stderr,strict'."""
    name, comma, of_filter = metric.partition(",")
    return f"{name}_stderr{comma}{of_filter}"
