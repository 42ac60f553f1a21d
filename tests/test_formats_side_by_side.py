"""Our folders beside llama.cpp's formats: the files, the bytes, the comparison, and a real run."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import edit_config

import singlequant as sq
from benchmarks import formats_side_by_side as script
from benchmarks.experiments import results
from benchmarks.peers import gguf_files
from singlequant.checkpoint.folder import load_checkpoint

TOKENS = np.arange(96) * 7 % 290 + 3


def row(by, name, stored, kl, **more):
    return {"by": by, "format": name, "bytes": stored, "kl_mean": kl, "bits_per_weight": 4.5,
            **more}


@pytest.fixture
def packed(model, tmp_path):
    """A packed folder of `model`."""
    out = tmp_path / "ours"
    sq.quantize_folder(model, out, sq.QuantConfig(scheme="w4a8", method="hadamard", weights="rtn",
                                                  calibration_tokens=64))
    return out


@pytest.fixture
def judge(model):
    return script.Judge(load_checkpoint(model), TOKENS, 32)


# ---- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tie", "shards"),
                         [("float16", True, 1), ("bfloat16", False, 2)])
def test_written_file_is_the_folder(make_checkpoint, tmp_path, dtype, tie, shards):
    pytest.importorskip("gguf")
    folder = make_checkpoint(tmp_path / "model", dtype=dtype, tie=tie, shards=shards)
    path = tmp_path / "model.gguf"
    gguf_files.write_gguf(folder, path)
    read = load_checkpoint(path)
    assert read.dtype == dtype
    assert script.weight_error(load_checkpoint(folder), read) == 0
    np.testing.assert_array_equal(sq.load(path).forward(TOKENS[None]),
                                  sq.load(folder).forward(TOKENS[None]))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"model_type": "gemma"}, "config.json: model_type: expected llama, found 'gemma'"),
     ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type: expected default, found 'llama3'"),
     ({"torch_dtype": "float32"}, "dtype: expected float16 or bfloat16, found 'float32'")])
def test_folder_that_cannot_be_written_is_refused_before_anything_runs(
        model, tmp_path, values, message):
    edit_config(model, **values)
    with pytest.raises(SystemExit, match=message):
        script.main([str(model), "--work", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()


def test_tensor_that_llama_has_not_is_named():
    with pytest.raises(ValueError, match="self_attn.q_proj.bias: expected a weight of a LLaMA"):
        gguf_files.gguf_name("model.layers.0.self_attn.q_proj.bias")


# ---- rows ---------------------------------------------------------------------------------------


def test_row_of_ours_counts_the_weight_files_alone(packed, judge):
    found = script.our_row(packed, judge)
    assert found["bytes"] == sum(f.stat().st_size for f in packed.glob("*.safetensors"))
    tensors = load_checkpoint(judge.original.path).tensors.values()
    stored = sum(info.nbytes for info in tensors) // 2  # numbers of 16 bits
    assert found["bits_per_weight"] == 8 * found["bytes"] / stored
    assert 0 < found["kl_mean"] < 1
    assert (found["format"], found["scheme"]) == ("ours", "w4a8")


def test_original_has_no_divergence_from_itself(judge):
    assert judge(judge.reference).kl_mean == pytest.approx(0, abs=1e-9)


def test_folder_of_another_kind_is_not_ours(model, judge, make_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="expected a packed folder with a vocabulary of 320"):
        script.our_row(model, judge)


def test_weight_error_is_relative_and_of_matrices_alone(model):
    original = load_checkpoint(model)
    half = SimpleNamespace(tensor=lambda name: original.tensor(name) * np.float32(0.75))
    assert script.weight_error(original, half) == pytest.approx(0.25, rel=1e-6)


def test_rival_is_the_closest_format_of_no_more_bytes():
    rows = [row("llama.cpp", "Q4_0", 90, 0.2), row("llama.cpp", "IQ4_XS", 80, 0.1),
            row("llama.cpp", "Q8_0", 101, 0.01), row("llama.cpp", "Q4_1", 95, 0.001),
            row("singlequant", "big", 100, 0.05), row("singlequant", "tiny", 79, 0.05)]
    found = script.compared(rows, ["Q4_0", "IQ4_XS", "Q8_0"])
    assert [r["format"] for r in found] == ["tiny", "IQ4_XS", "Q4_0", "Q4_1", "big", "Q8_0"]
    assert (found[4]["rival"], found[4]["ratio"]) == ("IQ4_XS", 0.5)
    assert (found[0]["rival"], found[0]["ratio"]) == (None, None)
    assert "rival" not in found[1]
    assert script.compared(rows, ["Q4_1"])[4]["ratio"] == pytest.approx(50)


def test_notes_name_formats_that_say_the_weights_nearly_exactly():
    rows = [row("llama.cpp", "Q4_0", 90, 0.2, weight_error=0.08),
            row("llama.cpp", "Q4_1", 95, 0.001, weight_error=0.004)]
    original = SimpleNamespace(perplexity=27.0, predictions=511, seq_len=512)
    notes = script.notes_of(rows, original, ["Q4_0"], "llama-cpp-python 1")
    assert any(note.startswith("Q4_1 can say these weights nearly exactly") for note in notes)
    assert "Ours are not compared with Q4_1." in notes
    assert any("no importance matrix" in note for note in notes)


def test_importance_is_the_mean_square_of_each_input_of_a_linear(model, tmp_path):
    original = load_checkpoint(model)
    windows = TOKENS.reshape(3, 32)
    path = script.importance_file(original, windows, tmp_path)
    values = np.load(path)
    assert len(values.files) == 7 * original.spec.layers
    assert values["blk.0.ffn_down.weight"].shape == (96,)
    embedded = original.tensor("model.embed_tokens.weight")[TOKENS].astype(np.float64)
    norm = original.tensor("model.layers.0.input_layernorm.weight").astype(np.float64)
    read = embedded / np.sqrt((embedded**2).mean(axis=1, keepdims=True) + 1e-5) * norm
    for role in "qkv":
        np.testing.assert_allclose(values[f"blk.0.attn_{role}.weight"], (read**2).mean(axis=0),
                                   rtol=1e-4)
    assert script.importance_file(original, windows, tmp_path) == path
    assert script.importance_file(original, windows[:2], tmp_path) != path


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None,
                    reason="llama-cpp-python is installed here")
def test_rows_of_ours_stand_alone_without_llama_cpp(model, packed, text, tmp_path, capsys):
    out = tmp_path / "out"
    script.main([str(model), "--ours", str(packed), "--work", str(tmp_path / "work"), "--text",
                 str(text), "--seq-len", "32", "--windows", "2", "--out", str(out)])
    said = capsys.readouterr().out
    assert "left out: llama.cpp: ModuleNotFoundError: No module named 'llama_cpp'" in said
    written = json.loads((out / "formats-model.json").read_text())
    assert [(r["by"], r["format"]) for r in written["rows"]] == [("singlequant", "ours")]
    assert not list((tmp_path / "work").iterdir())
    found, = results.read_results(out)
    assert found.kind == "formats"
    assert "| singlequant | ours |" in results.section(found, tmp_path / "images")


def test_original_judges_what_was_exported_of_it(model, packed, text, tmp_path):
    rotated = sq.export(model, "rotated-hf", tmp_path / "rotated", dtype="float16")
    given = ["--ours", str(packed), "--work", str(tmp_path / "work"), "--text", str(text),
             "--seq-len", "32", "--windows", "2"]
    by_itself = script.run(script.parse([str(model), *given]))
    exported = script.run(script.parse([str(rotated), "--original", str(model), *given]))
    assert exported.name == "formats-rotated"
    assert by_itself.notes == exported.notes
    ours = [next(r for r in report.rows if r["by"] == "singlequant")
            for report in (by_itself, exported)]
    assert ours[0] == ours[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--formats", "Q4_0,Q9_9"], "expected some of Q4_0.* found Q9_9"),
     (["--windows", "0"], "--windows: expected integers")])
def test_options_are_refused_by_name(options, message, capsys):
    with pytest.raises(SystemExit):
        script.parse(["MODEL", "--work", "work", *options])
    assert message.split(".*")[0] in capsys.readouterr().err


def test_more_windows_than_the_text_has_are_refused(model, text, tmp_path):
    with pytest.raises(SystemExit, match=r"--windows: expected at most \d+, the text's, found 99"):
        script.main([str(model), "--work", str(tmp_path), "--text", str(text), "--seq-len", "32",
                     "--windows", "99999"])


@pytest.mark.slow
def test_llama_cpp_makes_and_runs_its_formats(model, packed, text, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    arguments = script.parse([
        str(model), "--ours", str(packed), "--work", str(tmp_path / "work"), "--text", str(text),
        "--seq-len", "64", "--windows", "2", "--formats", "Q4_0,Q8_0", "--peer-python",
        sys.executable])
    rows = {r["format"]: r for r in script.run(arguments).rows}
    assert rows["F16"]["kl_mean"] < 1e-4 < rows["Q8_0"]["kl_mean"] < rows["Q4_0"]["kl_mean"]
    assert rows["F16"]["weight_error"] == 0 < rows["Q8_0"]["weight_error"] < 0.01
    assert rows["Q4_0"]["bytes"] < rows["Q8_0"]["bytes"] < rows["F16"]["bytes"]
    assert 0 < rows["Q4_0"]["kl_weights_alone"] < 1
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "work").iterdir()}
    assert files.keys() == {"model-F16.gguf", "model-Q4_0.gguf", "model-Q8_0.gguf"}
    script.run(arguments)  # files that are there are kept
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "work").iterdir()} == files
    arguments.importance = text
    weighted = script.run(arguments)
    assert weighted.name == "formats-model-importance"
    assert "had the importance matrix of" in " ".join(weighted.notes)
    again = {r["format"]: r for r in weighted.rows}
    assert again["Q4_0"]["weight_error"] != rows["Q4_0"]["weight_error"]
    assert again["F16"]["kl_mean"] == rows["F16"]["kl_mean"]


@pytest.mark.slow
def test_llama_cpp_quantizes_a_rotated_export(model, text, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    rotated = sq.export(model, "rotated-hf", tmp_path / "rotated", dtype="float16")
    arguments = script.parse([
        str(rotated), "--original", str(model), "--work", str(tmp_path / "work"), "--text",
        str(text), "--seq-len", "64", "--windows", "2", "--formats", "Q4_0", "--peer-python",
        sys.executable])
    rows = {r["format"]: r for r in script.run(arguments).rows}
    assert rows["F16"]["kl_mean"] < 1e-4 < rows["Q4_0"]["kl_mean"]
    assert rows["F16"]["weight_error"] == 0 < rows["Q4_0"]["weight_error"] < 0.2
