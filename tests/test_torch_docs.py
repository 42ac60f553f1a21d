"""The examples of docs/torch.md run, one after the other, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("transformers", "5.0", reason="needs transformers 5")

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "torch.md").read_text()


def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "torch_md"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    for block in blocks:
        exec(compile(block, "torch.md", "exec"), names)
    shown = capsys.readouterr().out
    assert len(blocks) == 4
    assert "The function returns" in shown
    assert "lm_head: left, it is the model's output head" in shown
    assert "2 linears in w4a8, 4.00 bits a weight" in shown
    assert "torch.Size([2, 64])" in shown
    assert repr(names["other"]) == repr(names["model"])


def test_links_exist():
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (DOCS / target).exists(), target
