# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of whole packed folders run and say what they measured."""

from __future__ import annotations

import json
from pathlib import Path

import packed_folders as folders
import pytest

from benchmarks import bench_load
from singlequant.checkpoint.folder import load_checkpoint


@pytest.fixture
def packed(make_checkpoint, tmp_path) -> Path:
    source = load_checkpoint(make_checkpoint(tmp_path / "model", hidden=256, intermediate=512))
    folders.write(source, tmp_path / "packed")
    return tmp_path / "packed"


def test_bench_load_tells_memory_beside_the_copy(packed, tmp_path, capsys):
    bench_load.main([str(packed), "--repeats", "2", "--json", str(tmp_path / "load.json")])
    (row,) = json.loads((tmp_path / "load.json").read_text())["rows"]
    words = sum(info.nbytes for name, info in load_checkpoint(packed).tensors.items()
                if name.endswith("weight_packed"))
    for kind in ("load", "copy"):
        assert row[kind]["words"] == words
        assert row[kind]["rss"] > 0
        assert len(row["runs"][kind]) == 2
    assert "| packed | 0.00 |" in capsys.readouterr().out
