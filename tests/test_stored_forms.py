# SPDX-License-Identifier: Apache-2.0
"""Folders as people have them: other names, tensors beside the model's own, wrappers."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import edit_config, make_checkpoint, write_weights
from safetensors.numpy import load_file

import singlequant as sq
from singlequant import FormatError, load_checkpoint
from singlequant.checkpoint.names import sort_extras
from singlequant.models.families import find_family
from singlequant.tensors import TensorInfo

FILE = "model.safetensors"
WRAPPER = "Mistral3ForConditionalGeneration"


def rewrite(folder: Path, change) -> dict[str, np.ndarray]:
    """Replaces the tensors of a folder by change(tensors); returns the old ones."""
    tensors = load_file(folder / FILE)
    write_weights(folder, change(dict(tensors)), 1)
    return tensors


def rename(folder: Path, new_name) -> dict[str, np.ndarray]:
    return rewrite(folder, lambda tensors: {new_name(n): t for n, t in tensors.items()})


def check_same(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    checkpoint = load_checkpoint(folder)
    assert set(checkpoint.tensors) >= set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), tensor)


# ---- names --------------------------------------------------------------------------------------


def without_base(name: str) -> str:
    return name.removeprefix("model.")


def inner(name: str) -> str:
    return name.replace("model.", "model.language_model.")


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "new_name",
    [
        without_base,
        inner,
        lambda n: f"language_model.{n}",
        lambda n: n.replace("model.", "language_model."),
        lambda n: f"language_model.{without_base(n)}",
        lambda n: f"a.b.{without_base(n)}",
    ],
)
def test_names_with_another_prefix_are_the_models_own(tmp_path, tie, new_name):
    folder = make_checkpoint(tmp_path / "m", tie=tie)
    tensors = rename(folder, new_name)
    check_same(folder, tensors)
    assert load_checkpoint(folder).ignored_tensors == ()


def test_quantized_folder_of_other_names_has_the_specs(tmp_path):
    plain, other = make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b")
    rename(other, without_base)
    packed = [sq.load(sq.quantize_folder(path, tmp_path / f"{path.name}-out").out)
              for path in (plain, other)]
    logits = [model.logits(model.hidden_states(np.arange(9)[None])) for model in packed]
    np.testing.assert_array_equal(*logits)


def test_two_models_in_a_folder_are_not_guessed_between(tmp_path):
    folder = make_checkpoint(tmp_path / "m")
    rewrite(folder, lambda tensors: {f"{side}.{name}": tensor for side in ("a", "b")
                                     for name, tensor in tensors.items()})
    with pytest.raises(FormatError, match=r"model\.embed_tokens\.weight: missing tensor"):
        load_checkpoint(folder)


def test_embedding_of_another_part_does_not_mislead(tmp_path):
    folder = make_checkpoint(tmp_path / "m")
    tensors = rename(folder, lambda name: f"language_model.{name}")
    rewrite(folder, lambda t: {**t, "talker.model.embed_tokens.weight": np.ones(4, np.float16)})
    with pytest.warns(UserWarning, match=r"1 tensor is not of the model and left out: talker\."):
        check_same(folder, tensors)


def test_name_that_is_there_twice_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "m")
    rename(folder, without_base)
    rewrite(folder, lambda t: {**t, "model.norm.weight": t["norm.weight"]})
    with pytest.raises(FormatError, match="norm.weight: duplicate: "):
        load_checkpoint(folder)


def test_missing_head_is_told_from_a_tied_one(tmp_path):
    folder = make_checkpoint(tmp_path / "m", tie=False)
    rewrite(folder, lambda t: {without_base(n): v for n, v in t.items() if n != "lm_head.weight"})
    with pytest.raises(FormatError, match=r"lm_head\.weight: missing tensor.*AutoModel.*tie_word"):
        load_checkpoint(folder)
    edit_config(folder, tie_word_embeddings=True)
    assert load_checkpoint(folder).spec.tied


# ---- tensors beside the model's own -------------------------------------------------------------

SILENT = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    "model.rotary_emb.inv_freq": np.ones(8, np.float32),
    "model.layers.1.attention.bias": np.ones((1, 1, 9, 9), np.bool_),
    "model.layers.1.attn.masked_bias": np.array(-1e9, np.float32),
}
REPORTED = {
    "vision_tower.blocks.0.weight": np.ones(3, np.float16),
    "visual.merger.bias": np.ones(3, np.float16),
    "multi_modal_projector.weight": np.ones((3, 3), np.float16),
    "mtp.layers.0.norm.weight": np.ones(3, np.float16),
    "model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 64), np.float16),
    "model.layers.0.self_attn.k_proj.k_scale": np.ones((), np.float16),
    "score.weight": np.ones((2, 64), np.float16),
}
FATAL = ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.attn.bias", "model.norm.bias",
         "model.layers.2.mlp.up_proj.weight", "model.embed_positions.weight", "lm_head.bias",
         "model.layers.0.self_attn.q_norm.weight"]


@pytest.mark.parametrize("name", SILENT)
def test_buffer_is_kept_in_the_list_without_a_word(model, name):
    rewrite(model, lambda tensors: {**tensors, name: SILENT[name]})
    assert load_checkpoint(model).ignored_tensors == (name,)


@pytest.mark.parametrize("name", REPORTED)
def test_tensor_that_is_not_of_the_model_is_reported(model, name):
    rewrite(model, lambda tensors: {**tensors, name: REPORTED[name]})
    with pytest.warns(UserWarning, match=f"model: 1 tensor is not of the model and.*: {name}$"):
        assert load_checkpoint(model).ignored_tensors == (name,)


def test_many_are_one_warning(model):
    rewrite(model, lambda tensors: {**tensors, **REPORTED})
    with pytest.warns(UserWarning, match="tensors are") as caught:
        checkpoint = load_checkpoint(model)
    assert checkpoint.ignored_tensors == tuple(sorted(REPORTED))
    assert [str(w.message) for w in caught] == [
        f"{model}: {len(REPORTED)} tensors are not of the model and left out: "
        f"{', '.join(sorted(REPORTED)[:3])}, ..."]


@pytest.mark.parametrize("name", FATAL)
def test_tensor_that_may_change_the_result_is_refused(model, name):
    rewrite(model, lambda tensors: {**tensors, name: np.ones(64, np.float16)})
    with pytest.raises(FormatError, match=f"{name}: unexpected tensor"):
        load_checkpoint(model)


def test_layers_that_predict_further_tokens_are_reported(model):
    spec, info = load_checkpoint(model).spec, TensorInfo(model, "F16", (64,), 0, 128)
    infos = {f"model.layers.{i}.eh_proj.weight": info for i in (2, 3, 20)}
    names = list(infos)
    config = {"num_nextn_predict_layers": 2}
    assert sort_extras(spec, config, infos, names[:2]) == ([], names[:2])
    for others, count in ((names[:1], None), (names[:1], 0), (names[1:2], 1), (names, 2)):
        with pytest.raises(FormatError, match="unexpected tensor"):
            sort_extras(spec, {"num_nextn_predict_layers": count}, infos, others)


def test_warning_is_one_line_of_the_command_line(model, capsys):
    from singlequant.cli.main import main

    rewrite(model, lambda tensors: {**tensors, "visual.x": np.ones(3, np.float16)})
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["generate", str(model), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"singlequant: warning: {model}: 1 tensor is not of the model and left out: "
                     "visual.x"]


# ---- which family -------------------------------------------------------------------------------


@pytest.mark.parametrize("architectures", [None, [], ["Qwen2Model"]])
def test_model_type_names_the_family(architectures):
    assert find_family({"architectures": architectures, "model_type": "qwen2"}).name.startswith(
        "Qwen2For")


@pytest.mark.parametrize("config", [
    {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
    {"architectures": ["MistralModel"], "model_type": "llama"},
    {"architectures": ["LlamaForCausalLM", "MistralForCausalLM"], "model_type": "llama"},
    {"architectures": None, "model_type": "bert"},
    {"architectures": None, "model_type": ["llama"]},
])
def test_another_architecture_is_not_overruled(config):
    with pytest.raises(FormatError, match="architectures: expected one of .*adding-a-family"):
        find_family(config)


@pytest.mark.parametrize(("name", "nearest"), [
    ("Qwen2VLForConditionalGeneration", "Qwen2ForCausalLM"),
    ("LLaMAForCausalLM", "LlamaForCausalLM"), ("MistralForCausalLm", "MistralForCausalLM")])
def test_error_names_the_nearest_and_the_guide(name, nearest):
    with pytest.raises(FormatError, match=f"'{name}'; the nearest is {nearest}; "
                                          "docs/adding-a-family.md tells how"):
        find_family({"architectures": [name]})
    assert (Path(__file__).parents[1] / "docs" / "adding-a-family.md").is_file()


# ---- wrappers -----------------------------------------------------------------------------------


def wrap(folder: Path, **outer) -> dict:
    """Makes the folder's config.json the text_config of a wrapper."""
    text = json.loads((folder / "config.json").read_text())
    text.pop("architectures")
    config = {"architectures": [WRAPPER], "model_type": "mistral3", "image_token_index": 10,
              "vision_config": {"hidden_size": 9}, "text_config": text} | outer
    (folder / "config.json").write_text(json.dumps(config))
    return text


@pytest.mark.parametrize("new_name", [inner, lambda n: f"language_model.{n}"])
def test_text_model_of_a_wrapper_is_read(tmp_path, new_name):
    folder = make_checkpoint(tmp_path / "m", architecture="MistralForCausalLM")
    plain = load_checkpoint(folder)
    expected = {name: plain.tensor(name).copy() for name in plain.tensors}
    wrap(folder)
    tower = "model.vision_tower.layers.0.weight"
    rewrite(folder, lambda tensors: {new_name(n): t for n, t in tensors.items()}
            | {tower: np.ones(3, np.float16)})
    with pytest.warns(UserWarning, match="left out: model.vision_tower"):
        checkpoint = load_checkpoint(folder)
    assert checkpoint.spec == plain.spec
    assert checkpoint.config["architectures"] == ["MistralForCausalLM"]
    assert checkpoint.ignored_tensors == (tower,)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), tensor)


def test_packed_folder_of_a_wrapper_is_the_text_model(tmp_path):
    folder = make_checkpoint(tmp_path / "m", architecture="MistralForCausalLM")
    wrap(folder, torch_dtype="float16", tie_word_embeddings=True)
    rename(folder, inner)
    out = sq.quantize_folder(folder, tmp_path / "out").out
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert "text_config" not in config
    assert "vision_config" not in config
    assert load_checkpoint(out).quantized


@pytest.mark.parametrize(("outer", "message"), [
    ({"architectures": ["PaliGemmaForConditionalGeneration"]}, "'PaliGemma.*text model 'mistral'"),
    ({"text_config": {"model_type": "mllama_text_model"}}, "text model 'mllama_text_model'"),
    ({"text_config": None}, f"found '{WRAPPER}'"),
])
def test_other_wrappers_are_refused_by_name(tmp_path, outer, message):
    folder = make_checkpoint(tmp_path / "m", architecture="MistralForCausalLM")
    wrap(folder, **outer)
    with pytest.raises(FormatError, match=f"architectures: expected one of .*{message}"):
        load_checkpoint(folder)
