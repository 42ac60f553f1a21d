"""What the benchmarks share: interleaved timing, medians and spread, the machine, JSON output."""

import json
import subprocess
import sys
from pathlib import Path

from singlequant.bench import interleave, summary

__all__ = ["ROOT", "commit", "environment", "interleave", "print_environment", "summary",
           "write_json"]

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
