# SPDX-License-Identifier: Apache-2.0
"""The rows of a comparison, and the file that keeps finished ones for a later run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import QuantConfig
from ...files import errors_name, json_text, numbers_back
from ...harness import Answers, PairedDifference, differences_json
from ..evaluate import Evaluation

ROWS_FILE = "rows.jsonl"
BEGIN = b'{"key": "'  # of each of its lines
STAGES = ("calibrate", "solve", "quantize", "evaluate")


@dataclass(frozen=True)
class Row:
    """One line of a comparison: the original (config None) or one quantized model.

    results has one Evaluation per text. tasks: task -> metric -> value. answers: the original's by
    task, with which others are paired. paired: task -> metric -> difference from the original,
    question by question; empty for the original. seconds: what this row alone would take, by
    stage; the quantize stage packs and writes. peak_memory: anonymous bytes while it was made; None
    for the original. error: why there are no figures, or None.
    """

    config: QuantConfig | None
    default: bool = False  # the recipe's own rounding, not that of the other rows
    results: tuple[Evaluation, ...] = ()
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    answers: Mapping[str, Answers] = field(default_factory=dict)
    paired: Mapping[str, Mapping[str, PairedDifference]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    bytes_on_disk: int | None = None
    error: str | None = None

    @property
    def method(self) -> str:
        """The method's name; "original" for the unquantized model."""
        return "original" if self.config is None else self.config.method

    @property
    def scheme(self) -> str:
        """The scheme's name; "16-bit" for the unquantized model."""
        return "16-bit" if self.config is None else self.config.scheme

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; from_json() takes it back."""
        return {
            "method": self.method,
            "scheme": self.scheme,
            "default": self.default,
            "config": None if self.config is None else self.config.to_json(),
            "results": [result.to_json() for result in self.results],
            "tasks": {task: dict(values) for task, values in self.tasks.items()},
            "answers": {task: found.to_json() for task, found in self.answers.items()},
            "paired": differences_json(self.paired),
            "seconds": dict(self.seconds),
            "peak_memory": self.peak_memory,
            "bytes_on_disk": self.bytes_on_disk,
            "error": self.error,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        """The row of a dict."""
        values = numbers_back({k: v for k, v in values.items() if k not in ("method", "scheme")})
        config = values["config"]
        values["config"] = None if config is None else QuantConfig.from_json(config)
        values["results"] = tuple(Evaluation(**result) for result in values["results"])
        values["answers"] = {task: Answers.from_json(found)
                             for task, found in values.get("answers", {}).items()}
        values["paired"] = {
            task: {metric: PairedDifference(**found) for metric, found in metrics.items()}
            for task, metrics in values.get("paired", {}).items()}
        return cls(**values)


class RowsFile:
    """Finished rows as JSON lines {"key", "row"}, kept for a later run; path None keeps nothing.

    A line {"key", "built"} says what making a packed folder cost that is not evaluated yet. A last
    line without its end is cut off; ValueError names any other line that is damaged, and a file
    that another run is using.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, Any] = {}
        self.built: dict[str, Any] = {}

    def __enter__(self) -> RowsFile:
        if self.path is None:
            return self
        self._file = self.path.open("a+b")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self.path is not None:
            with contextlib.suppress(OSError):  # it writes again what a full disk did not take
                self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: in use by another run") from None
        except OSError:
            pass  # some network file systems cannot lock

    def _read(self) -> None:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                if "row" in values:
                    Row.from_json(values["row"])
                    self.rows[values["key"]] = values["row"]
                else:
                    self.built[values["key"]] = values["built"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.path}, line {number}: expected a row of a comparison, "
                                 f"found: {error}") from None
        if torn and not (torn.startswith(BEGIN) or BEGIN.startswith(torn)):
            raise ValueError(f"{self.path}: expected rows of a comparison, found a last line that "
                             f"is none: move the file away")
        if torn:
            self._file.truncate(self._file.tell() - len(torn))

    def add(self, key: str, kind: str, values: Mapping[str, Any], durable: bool = True) -> None:
        """Append a "row" or what was "built"; durable: on the disk when this returns."""
        (self.rows if kind == "row" else self.built)[key] = dict(values)
        if durable and self.path is not None:
            with errors_name(self.path):
                self._file.write(json_text({"key": key, kind: values}).encode())
                self._file.write(b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())
