"""Rows that an earlier run of a command finished, so that it can be stopped and started again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class KeptRows:
    """Rows by key, in a file of JSON lines {"key", "row"}; path None keeps nothing.

    A key names all that its row depends on. A last line that is torn counts as none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path is None or not path.is_file():
            return
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        for line in whole.splitlines():
            values = json.loads(line)
            self.rows[values["key"]] = values["row"]

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row, on the disk too."""
        self.rows[key] = row
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "row": row}) + "\n")
