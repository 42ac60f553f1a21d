# SPDX-License-Identifier: Apache-2.0
"""A table of recipes: the options, the rows, and their divergence beside the baseline's.

`ranges` and `closed_forms` are such tables.
"""

from __future__ import annotations

import argparse
import fnmatch
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import singlequant as sq

from .. import common
from . import command
from .kept import KeptRows
from .report import Report
from .rounding import Range
from .simulation import Experiment, Recipe
from .transforms import named

Measure = Callable[[Experiment, Recipe], dict[str, Any]]
WINDOWS, SEQ_LEN, TOKENS = 6, 512, 2048
BASELINE = Recipe("hadamard, rtn", "hadamard", named("hadamard"), "rtn", Range())


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options of a table of recipes."""
    options = command.bare_parser(description, name)
    options.add_argument("model", nargs="?", type=Path, default=sq.bundled_model(), metavar="MODEL",
                         help="a save_pretrained folder (default: the bundled model)")
    command.add_texts(options)
    options.add_argument("--windows", type=command.positive, default=WINDOWS, metavar="N",
                         help="windows of the text (default %(default)s)")
    options.add_argument("--seq-len", type=command.positive, default=SEQ_LEN, metavar="N",
                         help="tokens of a window (default %(default)s)")
    options.add_argument("--only", metavar="PATTERN", help="rows whose name matches (fnmatch)")
    options.add_argument("--out", type=Path, metavar="DIR",
                         help="write DIR/NAME.json, .csv, .md and keep finished rows there")
    options.add_argument("--quick", action="store_true", help="few tokens: does it run?")
    options.set_defaults(calibration_tokens=TOKENS)
    return options


def open_experiment(arguments: argparse.Namespace) -> Experiment:
    """The experiment of parsed arguments; --quick takes few tokens."""
    a, few = arguments, (2, 64, 512)
    windows, seq_len, tokens = few if a.quick else (a.windows, a.seq_len, a.calibration_tokens)
    text = command.evaluation_text(a.text)
    return Experiment(a.model, text, a.calibration, windows, seq_len, tokens)


def choose(recipes: Sequence[Recipe], only: str | None) -> list[Recipe]:
    """The recipes whose name matches, the baseline first in any case."""
    chosen = [r for r in recipes if only is None or fnmatch.fnmatchcase(r.name, only)]
    if not chosen:
        raise ValueError(f"--only: expected a pattern that matches a row, got {only!r}")
    return [BASELINE, *(r for r in chosen if r.name != BASELINE.name)]


def run_rows(
    name: str, title: str, recipes: Sequence[Recipe], measure: Measure,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Measure the chosen recipes and report them; returns the rows.

    A row is measure()'s, its KL and agreement, and `ratio`, its KL over the baseline's. Rows of the
    same model, tokens and code that DIR/NAME.jsonl holds are not measured again.
    """
    environment, experiment = common.environment(arguments.argv), open_experiment(arguments)
    common.print_environment(environment)
    chosen, digest = choose(recipes, arguments.only), experiment.digest()
    kept = KeptRows(None if arguments.out is None else arguments.out / f"{name}.jsonl")
    rows = []
    for recipe in chosen:
        key = f"{digest} {recipe.name}"
        if key not in kept.rows:
            kept.add(key, measured(experiment, recipe, measure))
        row = dict(kept.rows[key])
        rows.append({**row, "ratio": row["kl"] / (rows[0]["kl"] if rows else row["kl"])})
        print(f"{row['name']:<58} KL {row['kl']:.5f}  {rows[-1]['ratio']:.3f}  "
              f"{row['cpu_seconds']:.1f} s", flush=True)
    shown = [key for key in dict.fromkeys(k for row in rows for k in row)
             if key not in ("seconds", "cpu_seconds")]
    columns = [(key, key, "" if key == "name" else ".5g") for key in shown]
    model = experiment.checkpoint.path.resolve().name
    Report(name, title, columns, rows, [tokens_line(experiment)], model).write(
        arguments, environment)
    return rows


def main(name: str, title: str, description: str | None, recipes: Callable[[], Sequence[Recipe]],
         measure: Measure, argv: Sequence[str] | None) -> None:
    """The command `name`: parse, measure, report."""
    with command.errors_of(name):
        arguments = command.parse(parser(description, name), argv)
        run_rows(name, title, recipes(), measure, arguments)


def measured(experiment: Experiment, recipe: Recipe, measure: Measure) -> dict[str, Any]:
    """A recipe's row, with the seconds that it took."""
    start, cpu = time.perf_counter(), time.process_time()
    result = experiment.divergence(recipe)
    row = {"name": recipe.name, "kl": result.kl_mean, "top1": result.top1_agreement,
           **measure(experiment, recipe)}
    return {**row, "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu}


def tokens_line(experiment: Experiment) -> str:
    """The tokens behind a table, and what `ratio` is."""
    return (f"{experiment.windows.size} tokens in windows of {experiment.windows.shape[1]}, "
            f"{experiment.calibration.size} calibration tokens; weights and activations are "
            f"rounded and multiplied in float32. ratio: KL over that of `{BASELINE.name}`.")
