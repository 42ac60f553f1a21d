"""The kept results: a folder for each machine, the newest file of each kind."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import bench_peers

KINDS = ("peers", "ladder", "end-to-end", "side-by-side", "quantize", "transform", "attention",
         "memory", "sharing", "task-seconds", "torch-dynamic")
FILE = re.compile(r"(\d{4}-\d\d-\d\d)-(.+)\.json")
AMX_STEP = "tdpbsud"
RIVALS = ("int4", "int8", "16-bit", "32-bit")
OURS = ("ours_w4a4", "ours_w4a8")


@dataclass
class Machine:
    """A folder of results: the newest file of each name."""

    path: Path
    results: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def environment(self) -> Mapping[str, Any]:
        """Of the run that could use the most CPUs."""
        return max((r["environment"] for r in self.results.values()), key=lambda e: e["cpus"])

    def of(self, kind: str) -> list[tuple[str, Mapping[str, Any]]]:
        """(file name, result) of a kind."""
        return [(name, r) for name, r in self.results.items() if kind_of(name) == kind]

    @property
    def has_amx(self) -> bool:
        return any(AMX_STEP in r.get("peaks", {}) for r in self.results.values())


def kind_of(name: str) -> str | None:
    """The kind of a result from what follows the date in its file's name."""
    return next((k for k in KINDS if name.startswith(k) or name.endswith(k)), None)


def read_machines(folder: Path) -> list[Machine]:
    """Every machine in a folder. ValueError names a file that is no result."""
    if not folder.is_dir():
        raise ValueError(f"--from: expected a folder with a folder of results for each machine, "
                         f"found no {folder}")
    machines = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        machine = Machine(path)
        for file in sorted(path.glob("*.json")):
            match = FILE.fullmatch(file.name)
            if match is None or kind_of(match[2]) is None:
                raise ValueError(f"{file}: expected a name like 2025-01-31-ladder.json, of "
                                 f"{', '.join(KINDS)}")
            result = json.loads(file.read_text("utf-8"))
            if not isinstance(result, dict) or not {"environment", "rows"} <= result.keys():
                raise ValueError(f"{file}: expected environment and rows")
            if result.get("quick") or result.get("settings", {}).get("quick"):
                raise ValueError(f"{file}: the figures of a quick run mean nothing")
            machine.results[match[2]] = result
        if machine.results:
            machines.append(machine)
    if not machines:
        raise ValueError(f"{folder}: expected folders of results, found none")
    return machines


def peers_title(result: Mapping[str, Any]) -> str:
    what = "everything allowed" if result["isa"] == "best" else f"held to {result['isa'].upper()}"
    return f"Linears, {result['threads']} thread{'s' * (result['threads'] > 1)}, {what}"


def mean_share(rows: Sequence[Mapping[str, Any]], peer: str, m: int, key: str) -> float | None:
    """Geometric mean over the shapes of a share, None where there is none."""
    found = [r[key] for r in rows if r["peer"] == peer and r["m"] == m and r.get(key)]
    return bench_peers.geometric_mean(found) if found else None


def end_to_end_title(name: str) -> str:
    """'end-to-end-avx2' -> 'End to end avx2'."""
    return name.replace("-", " ").capitalize()
