"""`singlequant bench MODEL`: prefill and decode of a model in the terms of llama-bench."""

import json

import numpy as np
import pytest
from conftest import edit_config

import singlequant as sq
from singlequant.cli.main import main
from singlequant.study import bench_model


def test_bench_of_a_model_reports_both_tests(model, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert main(["bench", str(model), "-p", "64", "-n", "5", "-r", "3", "--kv-bits", "16",
                 "--threads", "1", "--json", str(path)]) == 0
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert result["n_threads"] == 1
    assert result["model"]["kv_bits"] == 16
    assert [t["test"] for t in result["tests"]] == ["pp64", "tg5"]
    assert [(t["n_prompt"], t["n_gen"]) for t in result["tests"]] == [(64, 0), (0, 5)]
    for test, count in zip(result["tests"], (64, 5), strict=True):
        samples = np.array(test["samples_ns"])
        assert len(samples) == 3
        np.testing.assert_allclose(test["avg_ns"], samples.mean(), atol=1)
        np.testing.assert_allclose(test["stddev_ns"], samples.std(ddof=1), rtol=1e-4, atol=2)
        np.testing.assert_allclose(test["samples_ts"], count / samples * 1e9, rtol=1e-3)
        np.testing.assert_allclose(test["avg_ts"], np.mean(test["samples_ts"]), rtol=1e-6)
        line = next(line for line in printed.splitlines() if f" {test['test']} |" in line)
        assert f"{test['avg_ts']:.2f} \u00b1 {test['stddev_ts']:.2f}" in line
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({len(line) for line in table}) == 1


def test_both_tests_run_the_model(model):
    loaded = sq.load(model)
    tokens = np.arange(2, 9)
    expected = loaded.forward(tokens[None])[0, -1]
    for run in (bench_model.prefill, bench_model.decode):
        np.testing.assert_allclose(run(loaded, tokens), expected, atol=1e-4)


def test_zero_tokens_leave_a_test_out(model):
    tests = bench_model.bench_model(model, prompt_tokens=0, new_tokens=2, repeats=1)["tests"]
    assert [t["test"] for t in tests] == ["tg2"]
    assert tests[0]["stddev_ts"] == 0


@pytest.mark.parametrize(("options", "message"), [
    (["-p", "-1"], "prompt_tokens: expected at least 0, got -1"),
    (["-r", "0"], "repeats: expected at least 1, got 0"),
    (["-p", "0", "-n", "0"], "expected one of them above 0"),
    ([], "prompt_tokens: expected at most 256"),
    (["-p", "2", "-n", "300"], "new_tokens: expected at most 256"),
    (["--seconds", "1"], "--seconds: expected no model"),
])
def test_bench_names_what_is_out_of_range(model, options, message, capsys):
    assert main(["bench", str(model), *options]) == 2
    assert message in capsys.readouterr().err


def test_default_lengths_are_those_of_llama_bench(model, monkeypatch):
    edit_config(model, max_position_embeddings=512)
    monkeypatch.setattr(bench_model, "timed", lambda run, repeats: [1.0] * repeats)
    tests = bench_model.bench_model(model)["tests"]
    assert [(t["test"], t["avg_ts"], len(t["samples_ns"])) for t in tests] == [
        ("pp512", 512.0, 5), ("tg128", 128.0, 5)]


def test_options_of_a_model_need_one(capsys):
    assert main(["bench", "--prompt-tokens", "3"]) == 2
    assert "--prompt-tokens: expected a model beside it" in capsys.readouterr().err
