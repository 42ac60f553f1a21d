# SPDX-License-Identifier: Apache-2.0
"""The model card: what the Hub's own library reads in it, its figures, and the same bytes again."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import edit_config
from huggingface_hub import ModelCard
from packed_folders import write

from singlequant import bundled_model
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.cli.main import main, parser
from singlequant.cli.quantize import config_from
from singlequant.config import QuantConfig
from singlequant.export.card import base_model, quantize_command
from singlequant.study.check import check

FAST = ["--method", "hadamard", "--weights", "rtn", "--bits", "4.5", "--calibration-tokens", "256"]


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def row(card: ModelCard, what: str) -> list[str]:
    """The two figures of a row of the table."""
    (line,) = [line for line in card.text.split("\n") if line.startswith(f"| {what}")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """The bundled model, quantized by the command, with the check at its end."""
    out = tmp_path_factory.mktemp("card") / "out"
    assert main(["quantize", str(bundled_model()), str(out), *FAST]) == 0
    return out


def test_hub_reads_the_front_matter(quantized):
    data = card_of(quantized).data.to_dict()
    assert data["library_name"] == "singlequant"
    assert data["pipeline_tag"] == "text-generation"
    assert {"singlequant", "w4a8", "4-bit"} <= set(data["tags"])
    assert data["quantized_by"].startswith("singlequant ")
    assert "base_model" not in data  # nothing says where the bundled model is on the Hub


def test_figures_are_those_of_the_folder(quantized):
    card, original = card_of(quantized), load_checkpoint(bundled_model())
    found = check(quantized, original)
    assert row(card, "perplexity") == [f"{found.reference_perplexity:.2f}",
                                       f"{found.perplexity:.2f}"]
    assert row(card, "KL divergence")[1] == f"{found.kl_mean:.4f}"
    index = json.loads((quantized / "model.safetensors.index.json").read_text())
    assert row(card, "size of the weights") == [
        f"{original.bytes_on_disk / 1e6:.1f} MB",
        f"{index['metadata']['total_size'] / 1e6:.1f} MB"]
    packed = load_checkpoint(quantized)
    weights = [linear.weight for i in range(packed.spec.layers)
               for linear in packed.layer(i).linears.values()]
    sizes = [w.shape[0] * w.shape[1] for w in weights]
    mean = sum(w.bits * size for w, size in zip(weights, sizes, strict=True)) / sum(sizes)
    assert float(row(card, "bits of a weight")[1]) == pytest.approx(mean, abs=0.005)
    assert str(found.predictions) in card.text


def test_card_has_the_command_that_made_the_folder(quantized):
    (line,) = [line for line in card_of(quantized).text.split("\n")
               if line.startswith("singlequant quantize")]
    arguments = shlex.split(line)[1:]
    made = QuantConfig.from_file(quantized / "recipe.json")
    assert config_from(parser().parse_args(arguments)) == made


def test_command_of_the_card_gives_the_same_bytes(quantized, tmp_path):
    copied = tmp_path / "another-name"
    shutil.copytree(bundled_model(), copied)
    (copied / "README.md").unlink()
    (line,) = [line for line in card_of(quantized).text.split("\n")
               if line.startswith("singlequant quantize")]
    words = {"MODEL": str(copied), "OUT": str(tmp_path / "out")}
    assert main([words.get(word, word) for word in shlex.split(line)[1:]]) == 0
    for file in quantized.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("config", [
    QuantConfig(),
    QuantConfig("w4a4", "paper", "mse", bits=4, clip=0.9, ignore=("*.down_proj", "lm_head")),
    QuantConfig(weights="rtn", calibration_tokens=512, seed=3, kv_bits=8, group_size=64),
    QuantConfig(bits=4 + 1 / 3, gptq_order=True, gptq_inputs="quantized", head_bits=6,
                calibration_window=128, calibration_bits=32),
    QuantConfig(method="spinquant", learned="a file.npz", embedding_bits=16),
])
def test_command_of_any_recipe_is_read_as_that_recipe(config):
    arguments = shlex.split(quantize_command(config, "self"))
    parsed = parser().parse_args(arguments[1:])
    assert config_from(parsed) == config
    assert parsed.calibration == "self"


def test_recipe_without_options_goes_by_its_file(tmp_path):
    config = QuantConfig(gptq_damping=0.05)
    arguments = shlex.split(quantize_command(config))
    (tmp_path / "recipe.json").write_text(json.dumps(config.to_json()))
    parsed = parser().parse_args(
        [str(tmp_path / word) if word == "recipe.json" else word for word in arguments[1:]])
    assert config_from(parsed) == config


def test_folder_that_was_not_measured_says_so(make_checkpoint, tmp_path):
    source = load_checkpoint(make_checkpoint(tmp_path / "source"))
    write(source, tmp_path / "out", QuantConfig("w4a16", bits=4, ignore=("*.down_proj",)))
    card = card_of(tmp_path / "out")
    assert "were not measured" in card.text
    assert "perplexity |" not in card.text
    assert row(card, "linears left as they were, of 14")[1] == "2"
    assert row(card, "bits of an activation")[1] == "not quantized"


@pytest.mark.parametrize(("name", "base"), [
    ("Owner/Model-1.5B", "Owner/Model-1.5B"), ("/home/me/model", None), ("model", None),
    ("a/b/c", None), ("x/`y`", None), ("x/y\n", None), (7, None), ("", None),
])
def test_base_model_is_the_one_that_config_names(make_checkpoint, tmp_path, name, base):
    make_checkpoint(tmp_path / "source")
    edit_config(tmp_path / "source", _name_or_path=name)
    source = load_checkpoint(tmp_path / "source")
    assert base_model(source) == base
    write(source, tmp_path / "out")
    assert card_of(tmp_path / "out").data.base_model == base


def test_base_model_is_the_one_whose_cache_it_is_in(make_checkpoint, tmp_path):
    folder = tmp_path / "models--Owner--Some--Model" / "snapshots" / "0123"
    folder.parent.mkdir(parents=True)
    make_checkpoint(folder)
    assert base_model(load_checkpoint(folder)) == "Owner/Some--Model"


@pytest.mark.parametrize(("before", "kept"), [
    ("---\nlicense: apache-2.0\nlanguage: [en, de]\nbase_model: x/y\ntags: [a]\n---\n# Card\n",
     {"license": "apache-2.0", "language": ["en", "de"]}),
    ("---\nlicense: {a: b}\nlanguage: en\n---\n", {"language": "en"}),
    ("---\nlicense: [unclosed\n---\n", {}),
    ("---\nlicense: " + "x" * 1000 + "\n---\n", {}),
    ("# A card without front matter\n", {}),
    ("\xff\xfe not UTF-8", {}),
])
def test_licence_and_language_of_the_source_stay(make_checkpoint, tmp_path, before, kept):
    make_checkpoint(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_bytes(before.encode("latin-1"))
    write(load_checkpoint(tmp_path / "source"), tmp_path / "out")
    data = card_of(tmp_path / "out").data.to_dict()
    assert {key: data[key] for key in ("license", "language") if key in data} == kept
    assert "base_model" not in data


def test_error_of_the_check_spoils_no_folder(tmp_path, capsys, monkeypatch):
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("short")
    monkeypatch.setattr("singlequant.study.check.bundled_text", lambda _: heldout.read_text())
    monkeypatch.setattr("singlequant.study.check.CHECK_WINDOWS", 0)
    assert main(["quantize", str(bundled_model()), str(tmp_path / "out"), *FAST]) == 2
    assert "expected" in capsys.readouterr().err
    assert "were not measured" in card_of(tmp_path / "out").text
    assert not (tmp_path / "out.partial").exists()


def test_interrupt_amid_the_check_is_resumed_to_the_same_bytes(quantized, tmp_path, monkeypatch,
                                                               capsys):
    def stop(*_):
        raise KeyboardInterrupt

    command = ["quantize", str(bundled_model()), str(tmp_path / "out"), *FAST]
    with monkeypatch.context() as patched:
        patched.setattr("singlequant.study.check.evaluate", stop)
        assert main(command) == 130
    assert "goes on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--resume"]) == 0
    for file in quantized.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (tmp_path / "out.partial").exists()
