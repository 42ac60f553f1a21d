# SPDX-License-Identifier: Apache-2.0
"""Numbers that are not finite: said in words to people, and as null with a reason in JSON."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import singlequant as sq
from singlequant.cli import evaluate as command
from singlequant.cli.main import main
from singlequant.files import json_text, numbers_back
from singlequant.study.compare import Row, RowsFile
from singlequant.study.evaluate import BEYOND, Evaluation

PACKAGE = Path(sq.__file__).parent


def strict(text):
    """JSON as its standard has it: no NaN, no Infinity."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def wild(model):
    """A model whose logits are finite and so large that exp of the mean likelihood is not."""
    tensors = load_file(model / "model.safetensors")
    scaled = tensors["model.norm.weight"].astype(np.float32) * np.float32(1e5)
    save_file({**tensors, "model.norm.weight": scaled}, model / "model.safetensors")
    return model


def test_numbers_become_null_with_a_reason_and_come_back():
    values = {"a": math.inf, "b": [{"c": -math.inf, "d": 1.5}], "e": None, "f": "x", "g": (1, 2)}
    found = strict(json_text(values))
    assert found == {"a": None, "a_reason": "infinite", "e": None, "f": "x", "g": [1, 2],
                     "b": [{"c": None, "c_reason": "infinite", "d": 1.5}]}
    assert numbers_back(found)["a"] == math.inf
    nan = strict(json_text({"a": math.nan}))
    assert nan == {"a": None, "a_reason": "not a number"}
    assert math.isnan(numbers_back(nan)["a"])


def test_eval_says_that_a_perplexity_is_infinite(wild, text, capsys):
    arguments = ["eval", str(wild), "--text", str(text), "--seq-len", "32", "--windows", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert f"perplexity      {BEYOND}" in printed.out
    assert "warning" not in printed.err
    assert main([*arguments, "--reference", str(wild), "--json"]) == 0
    found = strict(capsys.readouterr().out)
    for name in ("perplexity", "reference_perplexity"):
        assert found[name] is None
        assert found[f"{name}_reason"] == BEYOND
    assert found["predictions"] == 62


def test_eval_of_logits_that_are_nan_gives_json_and_fails(model, text, capsys):
    tensors = load_file(model / "model.safetensors")
    hurt = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file({**tensors, "model.norm.weight": hurt}, model / "model.safetensors")
    assert main(["eval", str(model), "--text", str(text), "--seq-len", "32", "--json"]) == 2
    printed = capsys.readouterr()
    found = strict(printed.out)
    assert found["perplexity"] is None
    assert "NaN or Inf" in found["perplexity_reason"]
    assert "NaN or Inf" in printed.err


def test_compare_says_that_a_perplexity_is_infinite_and_resumes(wild, text, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths = {kind: tmp_path / f"c.{kind}" for kind in ("json", "csv", "png")}
    arguments = ["compare", str(wild), "--methods", "none,hadamard", "--schemes", "w4a8",
                 "--no-default", "--text", str(text), "--seq-len", "32", "--windows", "2",
                 "--calibration", str(text), "--calibration-tokens", "64",
                 "--out", str(tmp_path / "out"), "--json", str(paths["json"]),
                 "--csv", str(paths["csv"]), "--picture", str(paths["png"])]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.count(BEYOND) == 3
    rows = strict(paths["json"].read_text())["rows"]
    assert [row["results"][0]["perplexity"] for row in rows] == [None] * 3
    assert {row["results"][0]["perplexity_reason"] for row in rows} == {BEYOND}
    lines = csv.DictReader(paths["csv"].read_text().splitlines())
    assert [line["perplexity"] for line in lines] == ["inf"] * 3
    for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines():
        strict(line)
    assert main(arguments) == 0
    assert capsys.readouterr().out == first


def test_divergence_that_is_not_finite_is_never_the_best():
    result = Evaluation(2.0, 8, 7, 8, 0.1, 0.5, 1.0, 1.0, 2.0)
    kl = [math.nan, 0.25, math.inf]
    rows = tuple(Row(sq.QuantConfig(seed=seed), results=(replace(result, kl_mean=value),))
                 for seed, value in enumerate(kl))
    table = sq.Comparison("m", "f", ("t",), 8, "bundled", rows, {}).table().splitlines()
    assert ["*" in line for line in table] == [False, False, True, False]


def test_row_that_is_kept_has_its_numbers_again(tmp_path):
    result = Evaluation(math.inf, 8, 7, 8, 0.1)
    row = Row(None, results=(result,), tasks={"t": {"perplexity": math.inf, "acc": 0.5}})
    with RowsFile(tmp_path / "rows") as file:
        file.add("a", "row", row.to_json())
    with RowsFile(tmp_path / "rows") as file:
        assert Row.from_json(file.rows["a"]) == row


def test_metric_of_a_task_is_said_in_words(capsys):
    command.print_task("t", {"perplexity": math.inf, "perplexity_stderr": math.nan},
                       {"perplexity": 2.0}, {})
    assert "infinite +- not a number  original 2.0000" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_model_with_such_a_number_in_its_config_is_refused(model, number, capsys):
    path = model / "config.json"
    config = path.read_text().rstrip().rstrip("}")
    path.write_text(f'{config}, "more": [0, {{"deep": {number}}}]}}')
    assert main(["generate", str(model), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert f"{path}: more[1].deep: expected a number that is finite, found" in error


def test_all_json_that_is_written_is_strict():
    """json.dumps is left for digests, a pipe and a filter of templates."""
    others = {"harness/adapter.py", "harness/tasks.py", "checkpoint/template_process.py",
              "checkpoint/folder.py", "study/compare/run.py"}
    for path in PACKAGE.rglob("*.py"):
        calls = re.findall(r"json\.dumps\((?:[^()]|\([^()]*\))*\)", path.read_text())
        loose = [call for call in calls if "allow_nan=False" not in call]
        assert not loose or path.relative_to(PACKAGE).as_posix() in others, (path, loose)


def test_weights_that_no_rotation_holds_are_named(model, text, tmp_path, capsys):
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.weight"] = np.full(tensors[f"{name}.weight"].shape, 1e38, np.float32)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert main(["quantize", str(model), str(tmp_path / "out"), "--calibration", str(text),
                 "--calibration-tokens", "64"]) == 2
    assert capsys.readouterr().err.startswith(f"singlequant: {name}: rotated for 8 bits: ")


def test_finite_weights_whose_activations_are_not_are_one_line(model, text, tmp_path, capsys):
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].astype(np.float32) * np.float32(1e37)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert main(["quantize", str(model), str(tmp_path / "out"), "--calibration", str(text),
                 "--calibration-tokens", "64"]) == 2
    assert capsys.readouterr().err == (
        "singlequant: layer 0: expected finite activations, found NaN or Inf\n")


def grown(model, name, factor):
    """The model, with a tensor of float32 that is larger by a factor."""
    tensors = load_file(model / "model.safetensors")
    tensors[name] = tensors[name].astype(np.float32) * np.float32(factor)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return str(model)


@pytest.mark.parametrize(("name", "factor", "where"), [
    ("layers.1.mlp.down_proj", 1e38, "layer 1, site down: "),
    ("layers.0.mlp.down_proj", 1e38, "layer 0, site down: "),
    ("layers.1.self_attn.v_proj", 1e38, "layer 1, inputs of o: "),
    ("layers.1.input_layernorm", 1e38, "layer 1, inputs of qkv: ")])
def test_inspect_names_the_layer_and_site_beyond_float32(model, text, capsys, name, factor, where):
    path = grown(model, f"model.{name}.weight", factor)
    assert main(["inspect", path, "--calibration", str(text)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"singlequant: {where}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("layer", [0, 1])
def test_eval_names_the_first_layer_beyond_float32(model, text, capsys, layer):
    path = grown(model, f"model.layers.{layer}.input_layernorm.weight", 1e38)
    assert main(["eval", path, "--text", str(text), "--seq-len", "32"]) == 2
    assert capsys.readouterr().err == (
        "singlequant: model: expected finite logits, found NaN or Inf (first in the activations of "
        f"layer {layer})\n")
    assert main(["generate", path, "--prompt", "def f"]) == 2
    assert "expected finite logits, found NaN or Inf" in capsys.readouterr().err
