# SPDX-License-Identifier: Apache-2.0
"""The short form of tools/break_runs.py: runs that are killed or stopped, or find a full disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize(("options", "points"), [
    (["kill", "--points", "12"], 12), (["stop", "--points", "8"], 8),
    (["full", "--step", "41"], None)])
def test_runs_that_are_broken_go_on_to_the_same_bytes(options, points, tmp_path):
    done = subprocess.run(
        [sys.executable, "-B", str(ROOT / "tools" / "break_runs.py"), *options],
        capture_output=True, text=True, cwd=tmp_path, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)})
    *_, last = done.stdout.splitlines() or [""]
    assert done.returncode == 0, done.stdout + done.stderr
    found, wrong = last.split()[0], last.split()[2]
    assert wrong == "0"
    assert int(found) == (points or int(found)) >= 8
