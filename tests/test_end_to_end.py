# SPDX-License-Identifier: Apache-2.0
"""The end-to-end benchmark: engines in processes, their logits compared, then timed in turn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import singlequant as sq
from benchmarks import end_to_end as bench
from benchmarks.peers import gguf_files
from benchmarks.peers.e2e_singlequant import SingleQuant

ROOT = Path(__file__).resolve().parents[1]
OURS = ["ours-16bit", "ours-w4a16", "ours-w4a8", "ours-w4a4"]


def run(*arguments, expect=0):
    """The finished process of the command on its toy network."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks.end_to_end", "--quick",
         *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=900, cwd=ROOT,
    )
    assert done.returncode == expect, done.stderr
    return done


def row(engine, kind, rate, phase="decode", batch=1):
    return {"engine": engine, "kind": kind, "phase": phase, "batch": batch,
            "tokens_per_s": {"median": rate}}


# ---- the command --------------------------------------------------------------------------------


def test_end_to_end_writes_a_row_per_engine_phase_and_batch(tmp_path):
    out = tmp_path / "out.json"
    done = run("--engines", ",".join(OURS), "--batch", "1,3", "--json", out, "--isa", "avx2")
    whole = json.loads(out.read_text())
    assert whole["environment"]["cpu"]
    assert whole["settings"]["transform"]["down"].startswith("dense 16 x dense 32")
    found = {(r["engine"], r["phase"], r["batch"]) for r in whole["rows"]}
    engines = ["singlequant 16-bit", "singlequant W4A16", "singlequant W4A8", "singlequant W4A4"]
    assert found == {(e, p, b) for e in engines for p in ("prefill", "decode") for b in (1, 3)}
    for r in whole["rows"]:
        rate = r["tokens_per_s"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert r["version"] == sq.__version__
        assert r["note"] in ("kernels avx2", "kernels generic")
    error = {r["engine"]: r["agreement"]["relative_error"] for r in whole["rows"]}
    assert error["singlequant 16-bit"] == 0 < error["singlequant W4A8"] < error["singlequant W4A4"]
    assert len(whole["ratios"]) == 3 * 2 * 2
    assert "prefill  batch 3    singlequant W4A4     16-bit:" in done.stdout


def test_end_to_end_agrees_with_transformers(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    out = tmp_path / "out.json"
    engines = ["ours-16bit", "transformers-float32", "transformers-bfloat16"]
    run("--engines", ",".join(engines), "--batch", "3", "--json", out)
    rows = json.loads(out.read_text())["rows"]
    agreement = {r["engine"]: r["agreement"] for r in rows}
    assert agreement["singlequant 16-bit"]["reference"] == "transformers float32"
    assert agreement["singlequant 16-bit"]["relative_error"] < 1e-4
    assert 0 < agreement["transformers bfloat16"]["relative_error"] < 0.1


def test_end_to_end_keeps_and_reuses_its_networks(tmp_path):
    run("--engines", "ours-16bit,ours-w4a4", "--batch", "1", "--work", tmp_path)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert len({p.parent for p in times}) == 2
    run("--engines", "ours-16bit,ours-w4a4", "--batch", "1", "--work", tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == times


def test_end_to_end_leaves_out_aloud_what_is_not_installed(tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    numpy = tmp_path / "numpy-only"
    numpy.mkdir()
    for found in Path(np.__file__).parents[1].glob("numpy*"):
        (numpy / found.name).symlink_to(found)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={numpy} exec {bare}/bin/python "$@"\n')
    python.chmod(0o755)
    done = run("--engines", "ours-16bit,transformers-float32,llama-F16", "--batch", "1",
               "--peer-python", python)
    absent = "ModuleNotFoundError: No module named"
    assert f"left out: transformers float32: {absent} 'torch'" in done.stdout
    assert f"left out: llama.cpp F16: {absent} 'llama_cpp'" in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--engines", "ours-w4a4,abacus", "found abacus"),
     ("--prompt", "1,2,3", "expected 2 numbers, as of --batch, found [1, 2, 3]"),
     ("--threads", "100000", "the CPUs here, found 100000"),
     ("--layers", "0", "--layers: expected at least 1, found 0")],
)
def test_end_to_end_names_the_option_it_refuses(capsys, option, value, message):
    with pytest.raises(SystemExit):
        bench.parse([option, value])
    assert message in capsys.readouterr().err


# ---- its parts ----------------------------------------------------------------------------------


def test_ratios_are_to_the_fastest_peer_of_each_kind():
    rows = [row("a", "16-bit", 10.0), row("b", "16-bit", 20.0), row("c", "int4", 25.0),
            row("d", "int8", 1000.0), row("e", "32-bit", 1000.0), row("us", "ours", 50.0),
            row("us", "ours", 7.0, phase="prefill")]
    here, alone = bench.ratios_of(rows)
    assert (here["16-bit"]["peer"], here["16-bit"]["ratio"]) == ("b", 2.5)
    assert (here["int4"]["peer"], here["int4"]["ratio"]) == ("c", 2.0)
    assert alone == {"engine": "us", "phase": "prefill", "batch": 1}


def test_check_logits_refuses_another_network():
    good = {"relative_error": 0.001, "kl_mean": 0.0, "top1_agreement": 1.0, "reference": "x"}
    bench.check_logits({"llama-F16": good})
    bench.check_logits({"llama-Q4_0": good | {"relative_error": 0.3, "top1_agreement": 0.4}})
    with pytest.raises(ValueError, match=r"llama.cpp F16: .* found 1\.4142"):
        bench.check_logits({"llama-F16": good | {"relative_error": 2**0.5}})
    with pytest.raises(ValueError, match=r"F16: .* 85% equal .* found 0\.0010 and 50%"):
        bench.check_logits({"llama-F16": good | {"top1_agreement": 0.5}})
    with pytest.raises(ValueError, match=r"Q4_0: expected .* found nan"):
        bench.check_logits({"llama-Q4_0": good | {"relative_error": float("nan")}})


@pytest.mark.parametrize("method", ["none", "hadamard"])
def test_require_transform_refuses_a_folder_that_does_less(tmp_path, method):
    source, out = tmp_path / "made", tmp_path / "out"
    bench.write_checkpoint(source, 1, bench.TOY)
    config = sq.QuantConfig("w4a4", bits=4, method=method, weights="rtn", calibration_tokens=64)
    sq.quantize_folder(source, out, config)
    with pytest.raises(ValueError, match="every site rotated, some inputs of 8 bits, found other"):
        bench.require_transform(out)


def test_engine_error_shows_what_the_engine_said(tmp_path):
    with pytest.raises(bench.EngineError, match=r"singlequant W4A4: .*absent"):
        bench.EngineProcess(bench.ENGINES["ours-w4a4"], tmp_path / "absent", [0], sys.executable)


def test_gguf_names_and_row_order_are_those_of_llama_cpp():
    assert gguf_files.gguf_name("model.layers.10.mlp.down_proj.weight") == "blk.10.ffn_down.weight"
    assert gguf_files.gguf_name("lm_head.weight") == "output.weight"
    # The rotary embedding turns (i, i + d / 2); llama.cpp turns (2i, 2i + 1) of the same head.
    weight = np.arange(16).reshape(16, 1)
    assert gguf_files.interleave_pairs(weight, 2)[:, 0].tolist() == [
        0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_decode_and_prefill_of_our_engine_give_the_logits_of_a_whole_pass(tmp_path):
    bench.write_checkpoint(tmp_path / "made", 2, bench.TOY)
    engine = SingleQuant(tmp_path / "made", "", sq.get_num_threads())
    tokens = np.random.default_rng(0).integers(0, engine.vocab, (3, 7))
    whole = engine.logits(tokens)
    engine.open(3, 7)
    for _ in range(2):
        engine.rewind(0)
        np.testing.assert_allclose(engine.prefill(tokens[:, :5]), whole[:, 4], atol=1e-4)
        np.testing.assert_allclose(engine.decode(tokens[:, 5]), whole[:, 5], atol=1e-4)
        engine.rewind(5)
        engine.decode(tokens[:, 0])
        engine.rewind(5)
        engine.decode(tokens[:, 5])
        np.testing.assert_allclose(engine.decode(tokens[:, 6]), whole[:, 6], atol=1e-4)
