# SPDX-License-Identifier: Apache-2.0
"""The benchmark of memory: its made models, what it measures, and its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_results import run

import singlequant as sq
from benchmarks import bench_memory
from benchmarks.made_model import LLAMA_2_13B, LLAMA_2_70B, QWEN_3_30B_A3B, TOY, write_checkpoint
from benchmarks.tables import between

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


# ---- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [
    TOY, replace(TOY, experts=4, chosen=2, head_dim=32, kv_heads=2)], ids=["dense", "experts"])
def test_model_of_several_files_is_that_of_one(tmp_path, widths):
    write_checkpoint(tmp_path / "whole", 3, widths, "bfloat16")
    write_checkpoint(tmp_path / "shards", 3, widths, "bfloat16", shard_bytes=2 * MIB)
    assert [file.name for file in (tmp_path / "whole").glob("*.safetensors*")] == [
        "model.safetensors"]
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    assert max(file.stat().st_size for file in shards) < 2 * MIB + 10_000  # and a header
    assert shards[1].name == f"model-00002-of-{len(shards):05}.safetensors"
    whole, many = (sq.load_checkpoint(tmp_path / name) for name in ("whole", "shards"))
    assert many.tensors.keys() == whole.tensors.keys()
    for name in whole.tensors:
        np.testing.assert_array_equal(many.tensor(name), whole.tensor(name), name)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.tensors.values())
    weights = sum(linear.n * linear.k for linear in whole.spec.layer(0).linears.values())
    assert weights == widths.layer_weights


# ---- the bound ----------------------------------------------------------------------------------


def counted(part: str, widths) -> float:
    (found,) = (p.count(widths, 8192) for p in bench_memory.PARTS if part in p.what)
    return found


def test_inputs_beyond_the_limit_of_states_are_no_anonymous_memory():
    of_token = 4 * 8192 * (3 * 8192)
    assert counted("inputs", LLAMA_2_70B) == of_token  # those of down are 0.94 GB, in a file
    assert counted("inputs", LLAMA_2_13B) == 4 * 8192 * (3 * 5120 + 13824)


def test_expert_has_the_tokens_that_chose_it():
    assert counted("inputs", QWEN_3_30B_A3B) == 4 * 8192 * (2048 + 4096 + 8 * (2048 + 768))


def test_bound_holds_one_gram_matrix():
    assert counted("Gram", LLAMA_2_70B) == 4.5 * 28672**2
    assert counted("Gram", QWEN_3_30B_A3B) == 4.5 * 4096**2  # o reads 32 heads of 128


# ---- the command --------------------------------------------------------------------------------


def test_run_says_what_it_took_and_leaves_nothing(tmp_path):
    found = tmp_path / "found.json"
    printed = run("bench_memory", "--widths", "toy", "--layers", 2, "--work", tmp_path, "--json",
                  found).stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == ["found.json"]
    (row,) = json.loads(found.read_text())["rows"]
    assert 0.03 < row["peak, GB"] < row["bound, GB"]
    assert row["peak, GB"] == max(row["peak of the check, GB"], *row["peak by layer, GB"])
    assert len(row["peak by layer, GB"]) == row["layers"] == 2
    assert 0 < row["check, s"] < row["wall, s"]
    assert row["layers per minute"] > 0
    assert row["disk, GB/s"] > 0
    assert row["written, GB"] >= 0.9 * row["result, GB"]
    for name in ("peak, GB", "bound, GB", "wall, s", "share of the disk's speed"):
        assert name in printed


def test_page_has_the_table_of_the_kept_results():
    page = (ROOT / "docs" / "scale.md").read_text()
    made = between(page, bench_memory.MARKS, bench_memory.text(bench_memory.results()))
    assert made == page, "python -m benchmarks.bench_memory --page docs/scale.md"
