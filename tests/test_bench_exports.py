# SPDX-License-Identifier: Apache-2.0
"""benchmarks/exports.py on a small model, without the programs that are not installed here."""

import sys
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import make_checkpoint

from benchmarks import exports as script
from singlequant.export.formats import FORMATS


@pytest.mark.skipif(find_spec("llama_cpp") is not None, reason="llama.cpp is installed here")
def test_every_recipe_and_format_that_runs_here_has_a_row(tmp_path, capsys, monkeypatch):
    model = make_checkpoint(tmp_path / "model", hidden=128, intermediate=256, dtype="bfloat16")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    (tmp_path / "text.txt").write_text("the quick brown fox rotates its tail. " * 60)
    script.main([str(model), "--work", str(tmp_path / "work"), "--seq-len", "64", "--windows", "2",
                 "--text", str(tmp_path / "text.txt"), "--threads", "1", "--out",
                 str(tmp_path / "out")])
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if " KL " in line and not line.startswith("|")]
    assert [line.split(" KL ")[0].split()[-1] for line in lines if "KL to" not in line] == [
        "packed", "hf", "packed", "gptq", "awq", "packed"]
    assert "left out: llama.cpp" in said
    assert "left out: compressed-tensors" in said
    values = [float(line.split(" KL ")[1]) for line in lines if "KL to" not in line]
    assert all(np.isfinite(values))
    assert (tmp_path / "out" / "exports-model.md").is_file()


def test_formats_are_those_of_the_table():
    assert {to for rows in script.EXPORTS.values() for to, _, _ in rows} <= {*FORMATS}
    assert script.EXPORTS.keys() == script.RECIPES.keys()
