# SPDX-License-Identifier: Apache-2.0
"""Windows and rows that workers score: the figures of one process."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import singlequant as sq
from singlequant.cli.main import main
from singlequant.distributed import ProcessWorkers, Workers
from singlequant.study import evaluate as evaluate_module
from singlequant.study.compare import evaluator as evaluator_module
from singlequant.study.evaluate import CachedScorer, evaluate

SENTENCES = "the quick brown fox rotates its tail. " * 200


class Recorded(Executor):
    """Threads that note which functions they were given, in order."""

    def __init__(self) -> None:
        self._pool, self.calls = ThreadPoolExecutor(2), []

    def submit(self, fn, /, *args, **kwargs):
        self.calls.append(pickle.loads(args[1])[0].__name__)
        return self._pool.submit(fn, *args)


@pytest.fixture
def small_groups(monkeypatch):
    """Two windows of 32 tokens at a time, so that a short text has several groups."""
    monkeypatch.setattr(evaluate_module, "TOKENS_PER_STEP", 64)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(SENTENCES)
    return path


@pytest.fixture
def folders(make_checkpoint, tmp_path, text):
    model = make_checkpoint(tmp_path / "model")
    config = sq.QuantConfig(bits=4, weights="rtn", calibration_tokens=64, calibration_window=32)
    sq.quantize_folder(model, tmp_path / "out", config, text)
    return model, tmp_path / "out"


def test_evaluation_has_the_figures_of_one_process(folders, small_groups):
    original, packed = map(sq.load, folders)
    tokens = packed.encode(SENTENCES)
    alone = evaluate(packed, tokens, 32, original)
    executor, steps = Recorded(), []
    spread = evaluate(packed, tokens, 32, CachedScorer(original),
                      lambda *step: steps.append(step), Workers(executor, 2))
    assert replace(spread, seconds=alone.seconds) == alone
    count = len(tokens) // 32
    assert executor.calls == ["score_windows"] * -(-count // 2)
    assert steps[-1] == (count, count)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_model_is_sent_as_its_place_and_loaded_once(folders):
    model = sq.load(folders[1], kv_bits=8)
    pickled = pickle.dumps((model, CachedScorer(model)))
    assert len(pickled) < 2048
    again, scorer = pickle.loads(pickled)
    assert (again.kv_bits, again.checkpoint.path) == (8, model.checkpoint.path.resolve())
    assert again is pickle.loads(pickle.dumps(model))
    assert scorer is pickle.loads(pickle.dumps(CachedScorer(model)))


def test_command_gives_the_same_json(folders, text, capsys):
    model, out = folders
    command = ["eval", str(out), "--text", str(text), "--seq-len", "32", "--windows", "9",
               "--reference", str(model), "--json"]
    found = []
    for options in ([], ["--executor", "processes", "--workers", "2"]):
        assert main([*command, *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
        del found[-1]["seconds"]
    assert found[0] == found[1]
    assert found[0]["kl_mean"] > 0


def test_not_finite_logits_of_a_worker_are_named(folders, small_groups):
    model = sq.load(folders[1])
    tokens = model.encode(SENTENCES)
    with ProcessWorkers(1) as workers, pytest.raises(ValueError, match="expected finite logits"):
        evaluate(Wild(), tokens, 32, workers=workers)


class Wild:
    """A model whose logits are not numbers."""

    def hidden_states(self, windows):
        return np.full((*windows.shape, 4), np.nan, np.float32)

    def logits(self, hidden):
        return np.full((len(hidden), 400), np.nan, np.float32)


def rows_of(result):
    """All that a comparison says of its rows but what it took."""
    return [replace(row, seconds={}, peak_memory=None,
                    results=tuple(replace(r, seconds=0) for r in row.results))
            for row in result.rows]


@pytest.fixture
def comparison(folders, text):
    def run(**changes):
        return sq.compare(folders[0], methods=["none", "hadamard", "quarot"], schemes=["w4a4"],
                          weights=["rtn"], calibration=text, calibration_tokens=64, texts=[text],
                          seq_len=32, windows=7, **changes)

    return run


def test_comparison_has_the_rows_of_one_process(comparison, small_groups):
    alone = comparison()
    executor, steps = Recorded(), []
    spread = comparison(workers=Workers(executor, 2), progress=lambda *step: steps.append(step))
    assert rows_of(spread) == rows_of(alone)
    assert len(alone.rows) == 5
    assert not any(row.error for row in alone.rows)
    assert steps[-1][0] == steps[-1][1]
    # the original's groups, then those of each sweep's rows at once: quarot has a model of its own
    assert executor.calls.count("score_windows") == 4
    assert executor.calls.count("_score_group") == 4 * 4


def test_row_that_a_worker_cannot_score_has_the_reason(comparison, small_groups, monkeypatch):
    def refuse(model, reference, windows):
        if model.checkpoint.quant_config.method == "hadamard":
            raise MemoryError("too small")
        return evaluate_module.score_windows(model, reference, windows)

    monkeypatch.setattr(evaluator_module, "score_windows", refuse)
    result = comparison(workers=Workers(Recorded(), 2))
    errors = {row.method: row.error for row in result.rows}
    assert errors["hadamard"] == "too small"
    assert {error for method, error in errors.items() if method != "hadamard"} == {None}


def test_folder_that_is_kept_has_no_parts_of_workers(comparison, tmp_path):
    kept = comparison(workers=Workers(Recorded(), 2), out=tmp_path / "kept")
    names = [path.name for path in (tmp_path / "kept").iterdir()]
    assert len(names) == len(kept.rows)  # a folder each but the original, and rows.jsonl
    assert not [name for name in names if "workers" in name]
    executor = Recorded()
    again = comparison(workers=Workers(executor, 2), out=tmp_path / "kept")
    assert rows_of(again) == rows_of(kept)
    assert executor.calls == []
