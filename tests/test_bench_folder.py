# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of whole packed folders run and say what they measured."""

from __future__ import annotations

import json
from pathlib import Path

import packed_folders as folders
import pytest

from benchmarks import bench_load, bench_sharing
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


def test_bench_sharing_puts_two_processes_beside_one(packed, tmp_path, capsys):
    path = tmp_path / "sharing.json"
    bench_sharing.main([str(packed), "--tokens", "16", "--rounds", "2", "--json", str(path)])
    found = json.loads(path.read_text())
    assert len(found["rows"]) == 2
    assert all(len(r["together"]) == 2 and r["alone"]["cpu_seconds"] > 0 for r in found["rows"])
    assert found["sum_over_alone"] == found["together"] / found["alone"]
    assert f"sum over alone {found['sum_over_alone']:.2f}" in capsys.readouterr().out


def test_ratios_of_sharing_are_those_of_the_medians():
    def took(seconds, cpu):
        return {"seconds": seconds, "cpu_seconds": cpu}

    rounds = [{"alone": took(1, 2), "together": [took(2, 2), took(4, 3)]}] * 3
    assert bench_sharing.summary(rounds, 100) == {
        "alone": 100, "together": 75, "sum_over_alone": 0.75, "cpu_time": 1.25}


def test_torch_dynamic_puts_our_linears_beside_torchs(tmp_path, capsys):
    pytest.importorskip("torch", reason="needs the torch extra")
    pytest.importorskip("transformers", reason="needs the torch extra")
    from benchmarks import torch_dynamic

    path = tmp_path / "dynamic.json"
    torch_dynamic.main(["--models", "bert,llama", "--width", "64", "--layers", "1", "--tokens",
                        "16", "--seconds", "0.1", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    shown = capsys.readouterr().out
    for model in ("bert", "llama"):
        found = {row["variant"]: row for row in rows if row["model"] == model}
        assert [*found] == ["float32", "torch int8", "w4a16", "w4a8", "w4a4"]
        assert found["float32"]["error"] == 0 < found["torch int8"]["error"]
        assert found["torch int8"]["error"] < found["w4a8"]["error"] < 0.5
        assert found["w4a8"]["bytes"] < 0.7 * found["torch int8"]["bytes"]
        ratio = found["torch int8"]["median"] / found["w4a8"]["median"]
        assert found["w4a8"]["speed_of_int8"] == ratio
        assert f"{model}, " in shown
