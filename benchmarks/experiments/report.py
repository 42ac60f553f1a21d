"""The report of an experiment: a table in Markdown, CSV and JSON, the machine, a figure.

Every experiment writes its tables through `Report`; results.py reads the JSON again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from singlequant.files import save_figure, write_file

from .. import common, tables

Row = Mapping[str, Any]
Column = tuple[str, str, str]  # header, key of a row, format or ""

# Okabe and Ito's colours, told apart by colour-blind readers; every line has its own marker too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


# ---- tables -------------------------------------------------------------------------------------


def cell(value: Any) -> str:
    """A table's cell: figures with four significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.4g}".rstrip(".")
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value))
    return str(value).replace("|", r"\|")


def _is_figure(value: Any) -> bool:
    """Whether a cell stands to the right: a number, or text that is one."""
    if value is None or isinstance(value, (int, float)):
        return True
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def table(rows: Sequence[Row], columns: Sequence[Column] | None = None) -> str:
    """Rows as a Markdown table; without columns, one for each key that holds anything."""
    if columns is None:
        keys = dict.fromkeys(key for row in rows for key in row)
        filled = [k for k in keys if any(row.get(k) not in (None, {}) for row in rows)]
        columns = [(key.replace("_", " "), key, "") for key in filled]
    marks = ["---:" if all(_is_figure(row.get(key)) for row in rows) else "---"
             for _, key, _ in columns]
    lines = [[header for header, *_ in columns], marks]
    for row in rows:
        values = [(row.get(key), form) for _, key, form in columns]
        lines.append([format(value, form) if form and value is not None else cell(value)
                      for value, form in values])
    return "\n".join(map(tables.line, lines))


def add_spread(row: dict[str, Any], values: Sequence[float], key: str) -> None:
    """Put the mean of values into row[key] and their sample standard deviation into key_sd."""
    mean = sum(values) / len(values)
    row[key] = mean
    row[f"{key}_sd"] = None
    if len(values) > 1:
        row[f"{key}_sd"] = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


# ---- the report ---------------------------------------------------------------------------------


@dataclass
class Report:
    """A table with its title and what stands below it.

    name: of the files. columns: None for all keys of the rows. model: its name, for results.py.
    more: values that the JSON holds beside the rows.
    """

    name: str
    title: str
    columns: Sequence[Column] | None
    rows: list[dict[str, Any]]
    notes: Sequence[str] = ()
    model: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def write(self, arguments: argparse.Namespace, environment: Mapping[str, Any] | None = None,
              figure: Any = None) -> Path | None:
        """Print the table; write NAME.md, .csv, .json and, with a figure, .png; the JSON's path.

        arguments: as `command.parse` made them; nothing is written where `out` is None.
        environment: the machine's description before the run (default: as it is now).
        """
        values = environment or common.environment(arguments.argv)
        notes = "".join(f"\n- {note}" for note in self.notes)
        text = f"## {self.title}\n\n{table(self.rows, self.columns)}\n{notes}\n"
        print("\n" + text, flush=True)
        if arguments.out is None:
            return None
        stem = arguments.out / self.name
        write_file(stem.with_suffix(".md"),
                   f"{text}\nMachine: {machine(values)}. Command: `{arguments.command}`\n")
        write_file(stem.with_suffix(".csv"), csv_text(self.rows))
        if figure is not None:
            save_figure(figure, stem.with_suffix(".png"))
        whole = {
            "title": self.title, "command": arguments.command, "environment": values,
            "options": shown_options(arguments), "model": self.model, "columns": self.columns,
            "rows": self.rows, "notes": list(self.notes),
            "figure": None if figure is None else f"{self.name}.png", **self.more,
        }
        path = stem.with_suffix(".json")
        write_file(path, json.dumps(whole, indent=1, allow_nan=False) + "\n")
        print(f"{stem}.md, .csv, .json{', .png' if figure is not None else ''}\n")
        return path


def machine(values: Mapping[str, Any]) -> str:
    """One line: the CPU, the kernels, the commit."""
    return (f"{values['cpu']}, {values['cpus']} CPUs, kernels {values['kernels']['active']}, "
            f"commit {values['commit']}")


def shown_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON values."""
    return {key: value if isinstance(value, (str, int, float)) or value is None else str(value)
            for key, value in vars(arguments).items() if key not in ("argv", "command")}


def csv_text(rows: Sequence[Row]) -> str:
    """All keys of all rows; an empty cell where a row has no value."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)),
                            lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# ---- figures ------------------------------------------------------------------------------------


def new_figure(**options: Any) -> Any:
    """A matplotlib Figure; None, said aloud, without matplotlib."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: it needs matplotlib (pip install 'singlequant[plots]'); run the same "
              "command again when it is there, finished rows are kept", file=sys.stderr)
        return None
    return Figure(layout="constrained", **options)


def figure(rows: int, columns: int, width: float = 4.2, height: float = 3.2, **shared: Any):
    """(Figure, axes [rows, columns]) in one style, or (None, None) without matplotlib, aloud."""
    drawn = new_figure(figsize=(width * columns, height * rows))
    if drawn is None:
        return None, None
    axes = drawn.subplots(rows, columns, squeeze=False, **shared)
    for axis in axes.flat:
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def style(number: int) -> Mapping[str, Any]:
    """Colour and marker of the line with that number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def plain_ticks(axis: Any, which: str = "y") -> None:
    """Ticks of a log axis as plain figures at 1, 2, 5, 10, ..., also where it spans no decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    side = axis.yaxis if which == "y" else axis.xaxis
    side.set_major_locator(LogLocator(subs=(1, 2, 5)))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    side.set_minor_formatter(NullFormatter())
