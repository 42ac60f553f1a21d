"""What the benchmarks share: interleaved timing, medians and spread, the machine, JSON output."""

import json
import re
import subprocess
import sys
from pathlib import Path

from singlequant import files
from singlequant.bench import interleave, summary

__all__ = ["ROOT", "commit", "environment", "interleave", "machine_name", "print_environment",
           "shown_arguments", "summary", "write_json", "write_result"]

ROOT = Path(__file__).resolve().parent.parent


def commit():
    """The checkout's commit, with a plus sign when files differ from it; None outside of one."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT,
            capture_output=True, text=True, check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def environment():
    """What a reader needs to judge the figures. The load is the machine's before the run."""
    from singlequant.info import machine_info

    return {**machine_info(), "commit": commit(), "argv": sys.argv[1:]}


def print_environment(values):
    kernels = values["kernels"]
    print(f"{values['cpu']}, {values['cpus']} CPUs, load {values['load']}")
    print(f"kernels {kernels['active']} (runnable: {', '.join(kernels['runnable'])}), "
          f"commit {values['commit']}, {values['blas']}")


def write_json(path, rows, values):
    Path(path).write_text(json.dumps({"environment": values, "rows": rows}, indent=1) + "\n")


def shown_arguments(argv):
    """A command's arguments without those that say where files of this machine are."""
    shown, skip = [], False
    for text in argv:
        if not skip and text not in ("--python", "--json", "--keep"):
            shown.append(text)
        skip = text in ("--python", "--json")
    return shown


def machine_name(values):
    """A folder's name for a machine: its CPU, its number of CPUs, its best kernels."""
    best = values["kernels"]["runnable"][0]
    text = f"{values['cpu']}-{values['cpus']}cpu-{best}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write_result(result, path=None, kept_as=None):
    """Write a result with an environment as JSON, to path and, under a name, among those kept."""
    targets = [] if path is None else [Path(path)]
    if kept_as:
        values = result["environment"]
        folder = ROOT / "benchmarks" / "results" / machine_name(values)
        folder.mkdir(parents=True, exist_ok=True)
        targets.append(folder / f"{values['date']}-{kept_as}.json")
    for target in targets:
        files.write_file(target, json.dumps(result, indent=1) + "\n")
        print(f"written {target}")
