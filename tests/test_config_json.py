# SPDX-License-Identifier: Apache-2.0
"""config.json: what a family reads of it, the description of a packed model, and the recipe."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import edit_config, write_json

import singlequant as sq
from singlequant._C import FormatError
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.config import QuantConfig
from singlequant.models.families import FAMILIES, find_family, language_config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["BertModel"]}, "LlamaForCausalLM, Mistral.*'BertModel'; the nearest"),
        ({"architectures": None, "model_type": "bert"},
         "architectures: expected one of .* found None"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures: expected one of"),
        ({"hidden_size": -64}, "hidden_size: expected an integer from 1 .* found -64"),
        ({"hidden_size": 0}, "hidden_size: .* found 0"),
        ({"hidden_size": True}, "hidden_size: .* found True"),
        ({"hidden_size": 64.0}, r"hidden_size: .* found 64\.0"),
        ({"vocab_size": 2**31}, "vocab_size: .* found 2147483648"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: .* found '2'"),
        ({"num_attention_heads": 6}, "num_attention_heads: expected a divisor of hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of .* found 3"),
        ({"head_dim": 15}, "head_dim: expected an even number .* from 2 to 15 to turn, found 15"),
        ({"head_dim": 2**31 - 2}, "head_dim: expected at most 65536, found 2147483646"),
        ({"hidden_act": "mish"}, "hidden_act: expected one of silu, .* found 'mish'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number"),
        ({"rope_theta": float("inf")}, "rope_theta: expected a number"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: expected 1 .* found 0\.5"),
        ({"rope_scaling": {"type": "mrope", "factor": 4.0}}, "rope_type: .* found 'mrope'"),
        ({"rope_parameters": {"rope_type": "axial"}}, "rope_parameters.rope_type.*'axial'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a number"),
        ({"rope_theta": 1e-30, "rope_scaling": {"type": "linear", "factor": 1e-30}},
         "rope_theta: expected frequencies that are finite"),
        ({"rope_scaling": [1]}, "rope_scaling: expected an object"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: expected"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method: .* found 'gptq'"),
        ({"intermediate_size": 128}, r"expected shape \[128, 64\], found \[96, 64\]"),
        ({"num_hidden_layers": 3}, "model.layers.2.* missing tensor"),
        ({"num_hidden_layers": 2**31 - 1}, "model.layers.2.* missing tensor"),
        ({"num_hidden_layers": 1}, "model.layers.1.* unexpected tensor"),
        ({"attention_bias": True}, "self_attn.q_proj.bias: missing tensor"),
        ({"tie_word_embeddings": False}, "lm_head.weight: missing tensor"),
    ],
)
def test_config_that_lies_is_refused(model, values, message):
    edit_config(model, **values)
    with pytest.raises(FormatError, match=message):
        load_checkpoint(model)


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"]
)
def test_config_without_a_size_is_refused(model, key):
    edit_config(model, remove=(key,))
    with pytest.raises(FormatError, match=f"config.json: {key}: .* found None"):
        load_checkpoint(model)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"a": 1, "a": 2}', "[" * 100_000, "\udcff", "1" * 10_000]
)
def test_config_that_is_not_an_object_is_refused(model, text):
    (model / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError, match=r"config\.json: expected a JSON object"):
        load_checkpoint(model)


def shape_of(**values: Any) -> Any:
    config = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 320,
    }
    name = values.pop("architecture", "LlamaForCausalLM")
    return FAMILIES[name].spec({**config, **values})


def test_shape_takes_the_defaults_of_transformers():
    llama = shape_of()
    attention = llama.attention
    assert (attention.kv_heads, attention.head_dim, llama.final_norm.eps) == (4, 16, 1e-6)
    assert (llama.max_position_embeddings, attention.window) == (2048, 0)
    assert attention.rotary.inv_freq[-1] == pytest.approx(10000 ** (-14 / 16))
    mistral = shape_of(architecture="MistralForCausalLM", num_attention_heads=16, head_dim=8)
    assert (mistral.attention.kv_heads, mistral.attention.window) == (8, 4096)
    qwen2 = shape_of(architecture="Qwen2ForCausalLM", num_attention_heads=32, head_dim=2)
    assert (qwen2.attention.kv_heads, qwen2.max_position_embeddings) == (32, 32768)
    assert [role for role, x in qwen2.layer(0).linears.items() if x.bias] == ["q", "k", "v"]


def test_sliding_window_is_mistrals_alone():
    assert shape_of(sliding_window=7).attention.window == 0
    mistral = {"architecture": "MistralForCausalLM", "num_key_value_heads": 4}
    assert shape_of(**mistral, sliding_window=7).attention.window == 7
    assert shape_of(**mistral, sliding_window=None).attention.window == 0


@pytest.mark.parametrize(("outer", "text", "weights"), [
    ("LlavaForConditionalGeneration",
     {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5,
      "max_position_embeddings": 4096, "vocab_size": 32064}, 6738939904),  # llava-1.5-7b-hf
    ("Gemma3ForConditionalGeneration",
     {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
      "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
      "sliding_window": 1024}, 3880263168),  # gemma-3-4b-it
])
def test_text_config_may_leave_out_the_usual_sizes(outer, text, weights):
    config = language_config({"architectures": [outer], "text_config": text})
    assert find_family(config).spec(config).parameters == weights


@pytest.mark.parametrize(("architecture", "key", "value"), [
    ("Gemma2ForCausalLM", "sliding_window_size", 4096),
    ("Starcoder2ForCausalLM", "activation_function", "gelu"),
    ("Starcoder2ForCausalLM", "attention_softmax_in_fp32", True),
    ("Starcoder2ForCausalLM", "scale_attention_softmax_in_fp32", True),
    ("Starcoder2ForCausalLM", "scale_attn_weights", True)])
def test_keys_that_a_familys_code_does_not_read_pass(architecture, key, value):
    usual = {"architecture": architecture, "num_key_value_heads": 4}
    assert shape_of(**usual, **{key: value}) == shape_of(**usual)


def test_keys_that_nothing_reads_are_refused_where_they_are_on():
    for off in (None, False, 0, "", []):
        assert shape_of(rope_interleaved=off) == shape_of()
    assert shape_of(max_sequence_length=16384) == shape_of()
    qwen2 = {"architecture": "Qwen2ForCausalLM", "num_key_value_heads": 4}
    assert shape_of(**qwen2, attention_bias=True, dual_chunk_attention_config={"a": 1}) == shape_of(
        **qwen2)
    assert shape_of(_name_or_path="x", hidden_dropout=0.1, unsloth_version="1") == shape_of()
    with pytest.raises(FormatError, match=r"rope_interleaved: expected no such key.* found True"):
        shape_of(rope_interleaved=True)
    with pytest.raises(FormatError, match="sliding_window_size: expected no such key"):
        shape_of(**qwen2, sliding_window_size=7)


def packed_folder(model: Path, tmp_path: Path) -> Path:
    config = QuantConfig(weights="rtn", method="hadamard", calibration_tokens=64)
    return sq.quantize_folder(model, tmp_path / "packed", config).out


@pytest.mark.parametrize(("block", "values", "message"), [
    ("attention", {"softcap": -1.0}, "attention.softcap: expected at least 0, found -1"),
    ("attention", {"slopes": [0.5]}, r"attention.slopes: expected shape\[0\] = 4, found 1"),
    ("attention", {"kv_rank": 8}, "attention: 'kv_a' is missing"),
    ("mlp", {"limit": 2.0}, "mlp.limit: expected 0, as the activation has none, found 2"),
])
def test_packed_folder_whose_numbers_make_no_layer_is_refused(model, tmp_path, block, values,
                                                              message):
    out = packed_folder(model, tmp_path)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["model"]["kinds"][0][block] |= values
    write_json(out / "config.json", config)
    with pytest.raises(FormatError, match=f"packed: layer 0: {message}"):
        sq.load(out)


def test_packed_folder_needs_no_row_of_its_family(model, tmp_path, monkeypatch):
    out = packed_folder(model, tmp_path)
    expected = sq.load(out).forward(np.arange(8).reshape(1, 8))
    edit_config(out, architectures=["SomethingElse"], hidden_size=7, num_hidden_layers=99)
    monkeypatch.setattr("singlequant.models.families.FAMILIES", {})
    np.testing.assert_array_equal(sq.load(out).forward(np.arange(8).reshape(1, 8)), expected)


def test_last_norm_has_its_offset(model, tmp_path):
    out = packed_folder(model, tmp_path)
    tokens = np.arange(8).reshape(1, 8)
    plain = sq.load(out)
    config = json.loads((out / "config.json").read_text())
    norm = config["quantization_config"]["model"]["final_norm"]
    norm["offset"] = 1.0
    write_json(out / "config.json", config)
    weight = np.asarray(plain.checkpoint.final_norm.weight, np.float32)
    np.testing.assert_allclose(sq.load(out).hidden_states(tokens),
                               plain.hidden_states(tokens) * ((weight + 1) / weight), rtol=1e-4)
    norm |= {"kind": "layer", "offset": 0.0}
    write_json(out / "config.json", config)
    found = sq.load(out).hidden_states(tokens) / weight
    np.testing.assert_allclose(found.mean(axis=-1), 0, atol=1e-3)
    np.testing.assert_allclose(found.std(axis=-1), 1, atol=1e-3)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("hidden",), 32, r"linears.q.k: expected 32, as the blocks ask for, found 64"),
        (("layers",), 3, "model.layers.2.* missing tensor"),
        (("layers",), 2**31 - 1, "model.layers.2.* missing tensor"),
        (("pattern",), [1], r"pattern: expected indices of 1 kinds, found \[1\]"),
        (("pattern",), [], r"pattern: expected indices of 1 kinds, found \[\]"),
        (("kinds",), [], "kinds: expected a list of objects"),
        (("embed",), "model.norm", r"model.norm: expected weight_codes alone"),
        (("tied",), 1, "tied: expected true or false, found 1"),
        (("kinds", 0, "attention", "heads"), 3, "kv_heads: expected a divisor of heads = 3"),
        (("kinds", 0, "attention", "head_dim"), 32, "linears.q.n: expected 128"),
        (("kinds", 0, "attention", "scale"), float("nan"), "scale: expected a number"),
        (("kinds", 0, "attention", "rotary", "inv_freq"), [1.0] * 9, "expected 1 to 8 frequencies"),
        (("kinds", 0, "attention", "rotary", "inv_freq"), ["x"], "expected numbers from"),
        (("kinds", 0, "attention", "rotary", "inv_freq"), [10**400], "expected numbers from"),
        (("final_norm", "offset"), 1e31, "offset: expected a number"),
        (("kinds", 0, "mlp", "activation"), "tanh", "activation: expected one of silu"),
        (("kinds", 0, "linears", "q", "name"), "{i}{i.__class__}", "missing tensor"),
        (("kinds", 0, "linears", "q", "name"), "q", "layers: expected at most 1, as a name"),
        (("kinds", 0, "linears", "q", "bias"), True, "q_proj.bias: missing tensor"),
        (("kinds", 0, "norms", "before_mlp", "kind"), "batch", "kind: expected one of rms, layer"),
        (("kinds", 0, "sites"), {"qkv": ["q"]}, "sites: expected .* as the blocks ask for"),
        (("kinds", 0, "surprise"), 1, "surprise: expected no such key"),
        (("surprise",), 0, "surprise: expected no such key"),
    ],
)
def test_packed_model_that_lies_is_refused(model, tmp_path, path, value, message):
    out = packed_folder(model, tmp_path)
    config = json.loads((out / "config.json").read_text())
    entry = config["quantization_config"]["model"]
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    write_json(out / "config.json", config)
    with pytest.raises(FormatError, match=message):
        load_checkpoint(out)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
# LlamaRotaryEmbedding(config).inv_freq of transformers 5.23 with torch 2.13, head_dim 16.
ROPE_TRUTH = {
    "default": [
        1.0, 0.3162277638912201, 0.10000000149011612, 0.03162277862429619,
        0.009999999776482582, 0.003162277862429619, 0.0010000000474974513, 0.0003162277862429619,
    ],
    "linear": [
        0.25, 0.07905694097280502, 0.02500000037252903, 0.007905694656074047,
        0.0024999999441206455, 0.0007905694656074047, 0.0002500000118743628, 7.905694656074047e-05,
    ],
    "llama3": [
        1.0, 0.193922758102417, 0.007638109382241964, 0.00022789578360971063,
        4.4194170186528936e-05, 8.570255886297673e-06, 1.6619674170215148e-06,
        3.2229328894572973e-07,
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({}, "default"),
        ({"rope_scaling": {"type": "default"}}, "default"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, "default"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 1e4}}, "linear"),
        ({"rope_scaling": LLAMA3, "rope_theta": 500000.0}, "llama3"),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}, "llama3"),
    ],
)
def test_rope_frequencies_equal_transformers(values, kind):
    rotary = shape_of(**values).attention.rotary
    assert rotary.scale == 1.0
    np.testing.assert_array_equal(rotary.inv_freq, np.array(ROPE_TRUTH[kind], np.float32))


# ---- the recipe ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheme": "w8a8"}, "scheme: expected one of w4a4, w4a8, w4a16, found 'w8a8'"),
        ({"method": "gptq"}, "method: expected one of .*singlequant, .* found 'gptq'"),
        ({"weights": None}, "weights: expected one of rtn, mse, gptq, found None"),
        ({"group_size": 48}, "group_size: expected 0 .* multiple of 32, found 48"),
        ({"group_size": -32}, "group_size: expected an integer from 0"),
        ({"group_size": 64.0}, r"group_size: expected an integer .* found 64\.0"),
        ({"clip": 0.0}, r"clip: expected a number in \(0, 1\], found 0\.0"),
        ({"clip": 1.5}, "clip: .* found 1.5"),
        ({"clip": float("nan")}, "clip: .* found nan"),
        ({"calibration_tokens": 0}, "calibration_tokens: expected an integer from 1"),
        ({"calibration_bits": 16}, "calibration_bits: expected one of 8, 32, found 16"),
        ({"seed": True}, "seed: expected an integer .* found True"),
        ({"ignore": "model.*"}, "ignore: expected a list of patterns"),
    ],
)
def test_quant_config_names_the_field_and_both_facts(values, message):
    with pytest.raises(ValueError, match=message):
        QuantConfig(**values)


def test_quant_config_round_trips_through_json(tmp_path):
    config = QuantConfig(
        scheme="w4a8", method="hadamard", weights="rtn", group_size=64, clip=0.9, seed=3,
        ignore=("*.down_proj",),
    )  # fmt: skip
    write_json(tmp_path / "recipe.json", config.to_json())
    assert QuantConfig.from_file(tmp_path / "recipe.json") == config
    assert dataclasses.replace(config, clip=None).to_json()["clip"] is None


def test_quant_config_file_names_unknown_keys(tmp_path):
    write_json(tmp_path / "recipe.json", {"scheme": "w4a4", "bitz": 4})
    with pytest.raises(ValueError, match=r"recipe\.json: unknown key 'bitz': expected keys are"):
        QuantConfig.from_file(tmp_path / "recipe.json")


def test_quant_config_resolves_the_schemes_clip():
    assert QuantConfig(scheme="w4a8").activation_clip == 1.0
    assert QuantConfig(scheme="w4a4").activation_clip < 1.0
    assert QuantConfig(clip=0.7).activation_clip == 0.7
    bits = [QuantConfig(scheme=scheme).activation_bits for scheme in ("w4a4", "w4a8", "w4a16")]
    assert bits == [4, 8, 16]


def test_quant_config_ignores_by_pattern():
    config = QuantConfig(ignore=("model.layers.0.*", "*.down_proj"))
    assert config.ignores("model.layers.0.self_attn.q_proj")
    assert config.ignores("model.layers.7.mlp.down_proj")
    assert not config.ignores("model.layers.10.self_attn.q_proj")
