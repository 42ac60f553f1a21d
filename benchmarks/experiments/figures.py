"""What convergence and latency share: their JSON and the form of a Markdown table."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks import common  # noqa: E402
from singlequant.files import write_file  # noqa: E402

Row = Mapping[str, Any]


def write_experiment(
    out: Path, name: str, argv: Sequence[str], environment: Mapping[str, Any], title: str,
    rows: Sequence[Row], notes: Sequence[str] = (), figure: str | None = None, **more: Any,
) -> Path:
    """OUT/NAME.json as results.py reads it; the file appears only when whole."""
    script = f"benchmarks/experiments/{name}.py"
    values = {
        "title": title,
        "command": shlex.join(["python", script, *argv]),
        "environment": {**environment, "argv": list(argv)},
        "rows": list(rows),
        "notes": list(notes),
        "figure": figure,
        **more,
    }
    return write_file(out / f"{name}.json", json.dumps(values, indent=1, allow_nan=False) + "\n")


def new_figure(*arguments: Any, **options: Any) -> Any:
    """A matplotlib Figure; None, said aloud, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: it needs matplotlib (pip install 'singlequant[plots]')", file=sys.stderr)
        return None
    return Figure(*arguments, **options)


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


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table: a column per key that holds anything."""
    keys = dict.fromkeys(key for row in rows for key in row)
    filled = [k for k in keys if any(row.get(k) not in (None, {}) for row in rows)]
    return table(rows, [(k.replace("_", " "), k, "") for k in filled])


def table(rows: Sequence[Row], columns: Sequence[tuple[str, str, str]]) -> str:
    """Rows as a Markdown table of columns (header, key of a row, format or "")."""
    rule = ["---:" if all(_is_figure(row.get(key)) for row in rows) else "---"
            for _, key, _ in columns]
    lines = [[header for header, *_ in columns], rule]
    for row in rows:
        values = [(row.get(key), form) for _, key, form in columns]
        lines.append([format(v, form) if form and v is not None else cell(v) for v, form in values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


__all__ = ["ROOT", "cell", "common", "markdown", "new_figure", "table", "write_experiment"]
