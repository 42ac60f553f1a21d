# SPDX-License-Identifier: Apache-2.0
"""`export --to compressed-tensors`: what it writes, and what the package and transformers read."""

import json

import family_models as zoo
import numpy as np
import pytest
from conftest import copy_golden, make_checkpoint
from exported_folders import quantized, settings, stored

import singlequant as sq
from singlequant import _C
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.cli.main import main
from singlequant.methods.registry import METHODS

SHARED = ("quarot", "hadamard", "kurtail", "conqur", "random")  # methods that look at no layer
PLAIN = ("none", "smoothquant")
TOLERANCE = 1e-4  # absolute, of float32 logits that reach 20
ACTIVATION_NOISE = 0.05  # of the logits' norm: scales of 8 bits are max / 127.5 there
TO = "compressed-tensors"


@pytest.fixture
def exported(model, tmp_path):
    """A function that quantizes and exports: (packed folder, exported folder)."""
    def make(dtype="float32", **options):
        packed = quantized(model, tmp_path / "packed", **options)
        return packed, sq.export(packed, TO, tmp_path / "out", dtype=dtype)
    return make


def logits(model, tokens):
    return sq.load(model, kv_bits=32).forward(tokens)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(4, 0), (4, 32), (5, 0), (6, 0), (8, 32)])
def test_words_are_kept_and_our_reader_finds_the_weights(bits, group, exported):
    packed, out = exported(bits=bits, group_size=group)
    source, found = load_checkpoint(packed), stored(out)
    linear = source.layer(1).linears["up"].weight
    name = "model.layers.1.mlp.up_proj"
    np.testing.assert_array_equal(found[f"{name}.weight_packed"], linear.words)
    np.testing.assert_array_equal(found[f"{name}.weight_scale"], linear.scales)
    assert found[f"{name}.weight_shape"].tolist() == [96, 64]
    (of,) = settings(out)["config_groups"].values()
    assert of["weights"] == {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False,
                             "strategy": "group" if group else "channel",
                             "group_size": group or None}
    read = load_checkpoint(out, dequantize=True)
    for role in ("q", "v", "o", "down"):
        weight = source.layer(0).linears[role].weight
        codes = _C.unpack(weight.words, weight.shape[1], weight.bits)
        np.testing.assert_array_equal(read.layer(0).linears[role].weight,
                                      _C.dequantize(codes, weight.scales))


def test_int_quantized_has_codes_of_a_byte_and_activations_by_token(exported):
    packed, out = exported(scheme="w4a8", bits=5.5)
    weight = load_checkpoint(packed).layer(0).linears["down"].weight
    found = stored(out)["model.layers.0.mlp.down_proj.weight"]
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, _C.unpack(weight.words, 96, weight.bits))
    (of,) = settings(out)["config_groups"].values()
    assert of["weights"]["num_bits"] == 8  # of several numbers, what a byte holds
    assert (of["input_activations"]["strategy"], of["input_activations"]["dynamic"]) == (
        "token", True)


def test_dense_linears_and_the_head_are_ignored_by_name(exported):
    _, out = exported(ignore=("*.1.mlp.down_proj",), head_bits=8, embedding_bits=8)
    assert settings(out)["ignore"] == ["lm_head", "model.layers.1.mlp.down_proj"]
    assert stored(out)["model.layers.1.mlp.down_proj.weight"].dtype == np.float32
    assert stored(out)["model.embed_tokens.weight"].dtype == np.float32


def test_fused_linears_share_a_tensor(tmp_path):
    folder = copy_golden("phi3-longrope", tmp_path)
    packed = quantized(folder, tmp_path / "packed")
    out = sq.export(packed, TO, tmp_path / "out", dtype="float32")
    layer = load_checkpoint(packed).layer(1).linears
    words = stored(out)["model.layers.1.self_attn.qkv_proj.weight_packed"]
    np.testing.assert_array_equal(words, np.concatenate(
        [layer[role].weight.words for role in "qkv"]))
    read = load_checkpoint(out, dequantize=True).layer(1).linears
    codes = _C.unpack(layer["up"].weight.words, layer["up"].weight.shape[1], 4)
    np.testing.assert_array_equal(read["up"].weight,
                                  _C.dequantize(codes, layer["up"].weight.scales))


def test_rotation_of_all_layers_is_one_matrix_and_stops_transformers(exported):
    packed, out = exported(method="quarot", ignore=("*.0.mlp.down_proj",))
    groups = settings(out)["transform_config"]["config_groups"]
    assert {name: group["apply"][0]["targets"] for name, group in groups.items()} == {
        "o_rotation": ["re:.*o_proj$"], "down_rotation": ["re:.*down_proj$"]}
    assert groups["down_rotation"]["apply"][0]["ignore"] == ["model.layers.0.mlp.down_proj"]
    found = stored(out)
    names = [name for name in found if name.endswith("_input.weight")]
    assert names == ["model.layers.0.self_attn.o_proj.o_rotation_input.weight",
                     "model.layers.1.mlp.down_proj.down_rotation_input.weight"]
    rotation = load_checkpoint(packed).layer(1).rotations["down"]
    x = np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)
    np.testing.assert_allclose(x @ found[names[1]] / 96**0.5, _C.rotate(x, rotation), atol=1e-5)
    assert json.loads((out / "config.json").read_text())["transformers_weights"].startswith(
        "none; transformers does not apply transform_config")


@pytest.mark.parametrize("method", [m.name for m in METHODS.values()
                                    if not m.extra and m.name not in (*SHARED, *PLAIN)])
def test_rotations_of_one_layer_each_are_refused(method, model, tmp_path):
    packed = quantized(model, tmp_path / "packed", method=method)
    with pytest.raises(ValueError, match=r"\w+: expected one rotation for all layers, as "
                       "transform_config says it, found (another one|an alignment or blocks)"):
        sq.export(packed, TO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({"scheme": "w4a4"}, "compressed-tensors: expected w4a16 or w4a8, found w4a4"),
    ({"bits": 5.5}, r"expected one number of bits for all linears of pack-quantized, found "
                    r"\d, .*: quantize with --bits 4"),
    ({"scheme": "w4a8", "clip": 0.9}, r"expected a clip of 1, .*, found 0\.9 \(the recipe\)"),
])
def test_what_cannot_be_said_is_refused_and_nothing_is_left(options, message, model, tmp_path):
    packed = quantized(model, tmp_path / "packed", **options)
    with pytest.raises(ValueError, match=message):
        sq.export(packed, TO, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(("name", "found"), [("mixtral-tied", "experts"),
                                             ("gpt2-tied", "weights stored as")])
def test_families_without_plain_linears_are_refused(name, found, tmp_path):
    packed = quantized(copy_golden(name, tmp_path), tmp_path / "packed")
    with pytest.raises(ValueError, match=f"expected a family of plain linears, found {found}"):
        sq.export(packed, TO, tmp_path / "out")


def test_unquantized_model_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="expected a packed folder, whose codes it keeps"):
        sq.export(model, TO, tmp_path / "out")


def test_command_says_nothing_of_activations_that_are_kept(model, tmp_path, capsys):
    packed = quantized(model, tmp_path / "packed", scheme="w4a8")
    for to, lost in ((TO, False), ("gguf-blocks", True)):
        out = tmp_path / to
        assert main(["export", str(packed), "--to", to, "--output", str(out)]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{out}: {to}, bfloat16\n")
        assert ("not quantized" in said) == lost


# ---- the package and transformers ---------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    pytest.importorskip("transformers", reason="needs transformers")
    return pytest.importorskip("torch", reason="needs torch")


def run(torch, model, tokens):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.float().numpy()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("options", [{}, {"group_size": 32, "method": "smoothquant"}, {"bits": 5},
                                     {"bits": 8, "ignore": ("*.1.mlp.down_proj",)}],
                         ids=["channel", "group", "5-bits", "8-bits"])
def test_transformers_gives_the_logits(options, dequantize, exported, torch):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig
    packed, out = exported(**options)
    model, report = AutoModelForCausalLM.from_pretrained(
        out, dtype="auto", output_loading_info=True,
        quantization_config=CompressedTensorsConfig(dequantize=dequantize))
    assert not any(report.values())
    tokens = zoo.random_tokens(40)[None]
    np.testing.assert_allclose(run(torch, model, tokens), logits(packed, tokens), atol=TOLERANCE,
                               rtol=0)


def test_transformers_quantizes_activations_of_w4a8(exported, torch):
    from transformers import AutoModelForCausalLM
    packed, out = exported(scheme="w4a8")
    tokens = zoo.random_tokens(40)[None]
    found = run(torch, AutoModelForCausalLM.from_pretrained(out, dtype="auto"), tokens)
    expected = logits(packed, tokens)
    plain = logits(sq.export(packed, "hf", out.with_name("plain"), dtype="float32"), tokens)
    assert np.linalg.norm(found - expected) < ACTIVATION_NOISE * np.linalg.norm(expected)
    assert np.linalg.norm(found - plain) > 1e-3 * np.linalg.norm(plain)


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_package_applies_the_rotations(method, scheme, exported, torch):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.transform import TransformConfig, apply_transform_config
    from transformers import AutoConfig, AutoModelForCausalLM
    packed, out = exported(method=method, scheme=scheme)
    with pytest.raises(ValueError, match="transformers does not apply transform_config"):
        AutoModelForCausalLM.from_pretrained(out)
    own = AutoConfig.from_pretrained(out)
    del own.quantization_config
    said = settings(out)
    transforms = TransformConfig.model_validate(said.pop("transform_config"))
    quantization = QuantizationConfig.model_validate(said)
    model = AutoModelForCausalLM.from_config(own, dtype=torch.float32)
    apply_quantization_config(model, quantization)
    apply_transform_config(model, transforms)
    ModelCompressor(quantization_config=quantization).compress_model(model)
    tensors = {name: torch.from_numpy(array) for name, array in stored(out).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    shared = [name for name in missing if "_rotation_input" in name]  # the first layer's
    assert shared
    assert {*missing} - {*shared} <= {"lm_head.weight"}  # the embedding's
    model.tie_weights()
    tokens = zoo.random_tokens(40)[None]
    found, expected = run(torch, model, tokens), logits(packed, tokens)
    bound = ACTIVATION_NOISE if scheme == "w4a8" else 1e-5
    assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)


def test_weights_in_bfloat16_cost_their_rounding_alone(tmp_path, torch):
    from transformers import AutoModelForCausalLM
    folder = make_checkpoint(tmp_path / "model", dtype="float32")
    packed = quantized(folder, tmp_path / "packed", group_size=32)
    out = sq.export(packed, TO, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    tokens = zoo.random_tokens(40)[None]
    found, expected = run(torch, model, tokens), logits(packed, tokens)
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
