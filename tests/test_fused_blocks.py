# SPDX-License-Identifier: Apache-2.0
"""benchmarks/fused_blocks.py: every variant of a small model, and what the balance wins."""

import json

import pytest

import singlequant as sq
from benchmarks import fused_blocks as script

pytest.importorskip("gguf", reason="needs the gguf extra")


def test_every_variant_has_a_row_and_balanced_blocks_lose_least(tmp_path, capsys):
    out = tmp_path / "rows.json"
    script.main([str(sq.bundled_model()), "--windows", "2", "--seq-len", "256", "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    kl = {row["variant"]: row["kl_mean"]["bundled heldout"] for row in rows}
    assert list(kl) == list(script.VARIANTS)
    assert kl["block balance"] == min(kl.values()) < kl["as it is"]
    assert "block balance" in capsys.readouterr().out


def test_unknown_variant_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        script.parse(["MODEL", "--variants", "none"])
    assert "expected some of as it is" in capsys.readouterr().err
