# SPDX-License-Identifier: Apache-2.0
"""The result of a comparison: its rows as a table, Markdown, CSV, JSON or a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import check_picture, json_text, not_finite, save_figure, write_file
from ...html import table_html
from ..evaluate import BEYOND
from .rows import STAGES, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEXT_COLUMNS = ("scheme", "method", "weights")
_MEASURES = (("perplexity", "perplexity", ".3f"), ("KL", "kl_mean", ".5f"),
             ("KL p99", "kl_p99", ".4f"), ("top-1", "top1_agreement", ".3f"))


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` found: the original's row, then those of the methods in the order asked."""

    model: str
    fingerprint: str
    texts: tuple[str, ...]
    seq_len: int
    calibration: str
    rows: tuple[Row, ...]
    machine: Mapping[str, Any]

    def __repr__(self) -> str:
        lines = [f"Comparison({self.model!r}, {len(self.rows)} rows)", self.table()]
        return "\n".join(lines + self._notes())

    def _repr_markdown_(self) -> str:
        return "\n\n".join([self.markdown(), *self._notes()]).replace("*", r"\*")

    def _repr_html_(self) -> str:
        text = sum(c in _TEXT_COLUMNS for c, *_ in self._cells())
        return table_html(f"{self.model}: {len(self.rows)} rows", self._cells(), text,
                          {i for i, _ in self._best()}, self._notes())

    def table(self) -> str:
        """Aligned columns; `*` marks the lowest divergence from the original in each scheme."""
        columns = self._cells()
        widths = [max(map(len, column)) for column in columns]
        text = [c in _TEXT_COLUMNS for c, *_ in columns]
        lines = [
            "  ".join(cell.ljust(width) if left else cell.rjust(width)
                      for cell, width, left in zip(line, widths, text, strict=True)).rstrip()
            for line in zip(*columns, strict=True)
        ]
        return "\n".join(lines)

    def markdown(self) -> str:
        """The same table in Markdown."""
        head, *lines = zip(*self._cells(), strict=True)
        rule = ["---" if cell in _TEXT_COLUMNS else "---:" for cell in head]
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))

    def _notes(self) -> list[str]:
        """What stands below the table: the mark's meaning and why rows have no figures."""
        notes = ["* lowest KL of its scheme"] if self._best() else []
        if any(row.paired for row in self.rows):
            notes.append("- original: mean difference of the answers to each question, +- its "
                         "standard error")
        for row in self.rows:
            what = [row.error] if row.error else []
            what += [f"perplexity{self._suffix(t)}: {BEYOND}" for t, result in
                     enumerate(row.results) if not_finite(result.perplexity)]
            notes += [f"{row.scheme} {row_name(row)}: {text}" for text in what]
        return notes

    def _suffix(self, t: int) -> str:
        """Of text t's name, where there are several."""
        return f" {self.texts[t]}" if len(self.texts) > 1 else ""

    def _best(self) -> set[tuple[int, int]]:
        """(row, text) of the lowest divergences by scheme; none where a scheme has one row."""
        best = set()
        for scheme in {row.scheme for row in self.rows if row.config}:
            rows = [i for i, row in enumerate(self.rows) if row.scheme == scheme and row.results]
            for t in range(len(self.texts)) if len(rows) > 1 else ():
                kl = {i: self.rows[i].results[t].kl_mean for i in rows}
                finite = [i for i in rows if not_finite(kl[i]) is None]
                best |= {(min(finite, key=kl.__getitem__), t)} if finite else set()
        return best

    def _cells(self) -> list[list[str]]:
        """The table by columns, each with its header first."""
        columns = self._recipe_columns()
        best = self._best()
        for t in range(len(self.texts)):
            columns += self._measure_columns(t, {i for i, text in best if text == t})
        for task, metric in self._task_columns():
            values = [row.tasks.get(task, {}).get(metric) for row in self.rows]
            columns.append([f"{task} {metric}", *(_format(value, ".4f") for value in values)])
            paired = [row.paired.get(task, {}).get(metric) for row in self.rows]
            if any(paired):
                columns.append([f"{task} {metric} - original", *(str(d or "-") for d in paired)])
        for stage in STAGES:
            columns.append([f"{stage} s", *(_format(row.seconds.get(stage), ".2f")
                                            for row in self.rows)])
        for header, name in (("peak MB", "peak_memory"), ("disk MB", "bytes_on_disk")):
            columns.append([header, *(_format(_megabytes(getattr(row, name)), ".1f")
                                      for row in self.rows)])
        return columns

    def _recipe_columns(self) -> list[list[str]]:
        """Scheme and method, the rounding, and the options in which rows differ."""
        quantized = [row.config for row in self.rows if row.config]
        columns = [["scheme", *(row.scheme for row in self.rows)],
                   ["method", *map(row_name, self.rows)]]
        for header, name in (("weights", "weights"), ("clip", "activation_clip"),
                             ("group", "group_size"), ("seed", "seed")):
            varies = len({getattr(config, name) for config in quantized}) > 1
            if name in ("weights", "activation_clip") or varies:
                columns.append([header, *(f"{getattr(row.config, name)}" if row.config else ""
                                          for row in self.rows)])
        return columns

    def _measure_columns(self, t: int, best: set[int]) -> list[list[str]]:
        """What was measured on text t; `*` at the KL of the rows in best."""
        suffix, columns = self._suffix(t), []
        for header, name, form in _MEASURES:
            cells = [_format(getattr(row.results[t], name), form) if row.results else "-"
                     for row in self.rows]
            if name == "kl_mean":
                cells = [cell + ("*" if i in best else " ") for i, cell in enumerate(cells)]
            columns.append([header + suffix, *cells])
        return columns

    def _task_columns(self) -> list[tuple[str, str]]:
        pairs = [(task, metric) for row in self.rows for task, values in row.tasks.items()
                 for metric in values]
        return list(dict.fromkeys(pairs))

    def records(self) -> list[dict[str, Any]]:
        """The rows as flat dicts of equal keys, one per column of the CSV; None where empty."""
        names = ("weights", "activation_clip", "group_size", "calibration_tokens", "seed")
        records = []
        for row in self.rows:
            record = {"method": row.method, "default": row.default, "scheme": row.scheme}
            record |= {name: getattr(row.config, name, None) for name in names}
            for t, text in enumerate(self.texts):
                suffix = f"[{text}]" if len(self.texts) > 1 else ""
                record |= {f"{name}{suffix}": getattr(row.results[t], name) if row.results else None
                           for _, name, _ in _MEASURES}
            for task, metric in self._task_columns():
                record[f"{task}.{metric}"] = row.tasks.get(task, {}).get(metric)
                if any(metric in r.paired.get(task, {}) for r in self.rows):
                    paired = row.paired.get(task, {}).get(metric)
                    record[f"{task}.{metric}_difference"] = getattr(paired, "difference", None)
                    record[f"{task}.{metric}_difference_stderr"] = getattr(paired, "stderr", None)
            record |= {f"{stage}_seconds": row.seconds.get(stage) for stage in STAGES}
            record |= {"peak_memory_bytes": row.peak_memory, "disk_bytes": row.bytes_on_disk,
                       "error": row.error}
            records.append(record)
        return records

    def to_csv(self, path: str | Path) -> Path:
        """Write the rows as comma-separated values; the file appears only when whole."""
        text = io.StringIO()
        records = self.records()
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return write_file(path, text.getvalue())

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained web page: figures, picture, table and what the words mean.

        The file appears only when whole. ImportError without matplotlib.
        """
        from .page import comparison_page

        columns = self._cells()
        text = sum(header in _TEXT_COLUMNS for header, *_ in columns)
        best = {row for row, _ in self._best()}
        return write_file(path, comparison_page(self, columns, text, best, self._notes()))

    def to_json(self, path: str | Path) -> Path:
        """Write rows, texts and the machine as JSON; the file appears only when whole."""
        values = {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "texts": list(self.texts),
            "seq_len": self.seq_len,
            "calibration": self.calibration,
            "machine": dict(self.machine),
            "rows": [row.to_json() for row in self.rows],
        }
        return write_file(path, json_text(values, indent=1) + "\n")

    def plot(self, path: str | Path | None = None) -> Figure:
        """matplotlib Figure of the rows; see `plots.draw`. Saved to `path` when given.

        The suffix of `path` is the format, and the file appears only when whole. ImportError
        without matplotlib.
        """
        if path is not None:
            check_picture(path)
        from .plots import draw

        figure = draw(self)
        if path is not None:
            save_figure(figure, path)
        return figure


def row_name(row: Row) -> str:
    """The method's name in the table and the picture."""
    return f"{row.method} (default)" if row.default else row.method


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e6
