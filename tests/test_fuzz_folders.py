# SPDX-License-Identifier: Apache-2.0
"""The short form of tools/fuzz_folders.py: damaged folders answer, or are refused by one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_damaged_folders_answer_or_are_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-B", str(ROOT / "tools" / "fuzz_folders.py"), "--seed", "1000",
         "--cases", "60"],
        capture_output=True, text=True, cwd=tmp_path, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)})
    assert done.stdout == "60 cases, 0 wrong\n", done.stdout + done.stderr
    assert done.returncode == 0
