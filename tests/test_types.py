# SPDX-License-Identifier: Apache-2.0
"""The types that a type checker gives users: good scripts pass, and mistakes are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import singlequant as sq
from singlequant.study.compare.options import Changes, CompareOptions

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "data" / "user_script.py"
SETUP = ["import singlequant as sq", 'model = sq.load("folder")', 'checkpoint = model.checkpoint']
WRONG = [
    'number: int = model.generate("a")', 'text: str = model.generate(["a"])',
    "model.generate(1.5)", "model.generate([1.5])", 'model.generate("a", top_k="3")',
    'model.generate("a", seeds=1)', "sq.load(3)", 'sq.load("folder", kv_bits="8")',
    'sq.quantize_model("folder")', 'sq.QuantConfig(schem="w4a8")', 'sq.QuantConfig(seed="1")',
    'sq.quantize_folder("folder", "out", "w4a8")', 'sq.compare("folder", method=["none"])',
    'sq.compare("folder", schemes=4)', "sq.perplexity(checkpoint, \"text\")",
    'sq.calibrate("folder", model.encode("a"))', 'sq.quantize("folder", [])',
    "sq.perplexity(model, \"text\").perplexities", 'model.tokenizer.encodes("a")',
]


def wrong_script(folder: Path) -> tuple[Path, set[int]]:
    """A script of mistakes, and the lines that have one each."""
    path, first = folder / "wrong.py", len(SETUP) + 1
    path.write_text("\n".join([*SETUP, *WRONG]) + "\n")
    return path, set(range(first, first + len(WRONG)))


def search_path() -> str:
    """Where a type checker looks beside the environment: nowhere, if the package is installed."""
    try:
        distribution("singlequant")
    except PackageNotFoundError:
        return str(ROOT)
    return ""


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy_accepts_a_users_script_and_finds_mistakes(tmp_path):
    """In one run, which takes a few seconds."""
    wrong, expected = wrong_script(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--follow-imports=silent",
         "--cache-dir", str(tmp_path / "cache"), str(SCRIPT), str(wrong)],
        capture_output=True, text=True, cwd=tmp_path, timeout=600,
        env={**os.environ, "MYPYPATH": search_path()})
    errors = [line.split(":")[:2] for line in done.stdout.splitlines() if ": error:" in line]
    assert {Path(name).name for name, _ in errors} == {"wrong.py"}, done.stdout + done.stderr
    assert {int(number) for _, number in errors} == expected, done.stdout


@pytest.mark.skipif(find_spec("basedpyright") is None, reason="basedpyright is not installed")
def test_pyright_accepts_a_users_script_and_finds_mistakes(tmp_path):
    """basedpyright is pyright in a wheel with its node; it brings 280 MB, so no extra has it."""
    wrong, expected = wrong_script(tmp_path)
    settings = {"typeCheckingMode": "standard", "extraPaths": [*filter(None, [search_path()])],
                "include": [str(wrong), str(SCRIPT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--outputjson", "--level", "error", "--project",
         str(tmp_path), "--pythonpath", sys.executable],
        capture_output=True, text=True, cwd=tmp_path, timeout=600)
    errors = json.loads(done.stdout)["generalDiagnostics"]
    assert {Path(error["file"]).name for error in errors} == {"wrong.py"}, done.stdout
    assert {e["range"]["start"]["line"] + 1 for e in errors} == expected, done.stdout


def test_changes_of_a_comparison_are_its_options():
    assert Changes.__annotations__.keys() == CompareOptions.__dataclass_fields__.keys()
    for name, field in CompareOptions.__dataclass_fields__.items():
        assert Changes.__annotations__[name].__forward_arg__ == field.type


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
