# SPDX-License-Identifier: Apache-2.0
"""The types that a type checker gives users: good scripts pass, and mistakes are found."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import singlequant as sq

ROOT = Path(__file__).resolve().parents[1]
RIGHT = """
import numpy as np
import singlequant as sq

model = sq.load("folder")
text: str = model.generate("a", max_new_tokens=2)
texts: list[str] = model.generate(["a", "b"])
ids: list[int] = model.generate([1, 2], stop_tokens=[3], on_token=lambda sequence, token: None)
batch: list[list[int]] = model.generate([[1, 2], [3]])
same: list[int] = model.generate(np.array([1, 2]))
"""
WRONG = [
    'number: int = model.generate("a")', 'text: str = model.generate(["a"])',
    "model.generate(1.5)", "model.generate([1.5])", 'model.generate("a", top_k="3")',
    'model.generate("a", seeds=1)',
]


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_checker_accepts_a_users_script_and_finds_mistakes(tmp_path):
    lines = [*RIGHT.splitlines(), *WRONG]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--follow-imports=silent",
         "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "user.py")],
        capture_output=True, text=True, cwd=ROOT, timeout=600)
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    first = len(RIGHT.splitlines()) + 1
    assert found == set(range(first, first + len(WRONG))), done.stdout


@pytest.mark.parametrize(("prompts", "kind"), [
    ("the", str), ([1, 2], int), (["the", "fox"], str), ([[1, 2], [3]], list),
    (np.array([1, 2]), int), ([np.array([1, 2]), np.array([3])], list)])
def test_results_are_of_the_declared_types(make_checkpoint, tmp_path, prompts, kind):
    found = sq.load(make_checkpoint(tmp_path / "model")).generate(prompts, max_new_tokens=2)
    if isinstance(prompts, str):
        assert isinstance(found, kind)
    else:
        assert isinstance(found, list)
        assert all(isinstance(value, kind) for value in found)
