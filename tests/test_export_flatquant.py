# SPDX-License-Identifier: Apache-2.0
"""`export --to flatquant`: vLLM-Ascend's formulas in NumPy on its tensors give our linears.

vLLM-Ascend itself runs on its accelerators alone. What it does with the tensors stands in its
vllm_ascend/quantization/methods/w4a4_flatquant.py.
"""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from conftest import SENTENCES, make_checkpoint
from exported_folders import stored

import singlequant as sq
from singlequant import _C
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.export.flatquant import factor_sizes

KIND = "W4A4_FLATQUANT_DYNAMIC"
TWO_FACTORS = ("singlequant", "paper", "hadamard", "random", "smoothquant", "none")


def quantized(folder, out, **options):
    text = out.with_name("text.txt")
    text.write_text(SENTENCES[:600])
    config = sq.QuantConfig(**{"scheme": "w4a4", "method": "singlequant", "weights": "rtn",
                               "bits": 4, "calibration_tokens": 128, **options})
    return sq.quantize_folder(folder, out, config, text).out


@pytest.fixture
def square(tmp_path):
    """A model whose widths both split alike: 64 = 8 * 8, 128 = 8 * 16."""
    return make_checkpoint(tmp_path / "model", hidden=64, intermediate=128, dtype="float32")


def sizes_of_vllm_ascend(n):
    """get_decompose_dim, which never ends where there is no answer."""
    a = math.isqrt(n) + (math.isqrt(n) ** 2 < n)
    while math.isqrt(a * a - n) ** 2 != a * a - n:
        a += 1
    b = math.isqrt(a * a - n)
    return a - b, a + b


def test_sizes_are_those_of_vllm_ascend():
    for n in range(1, 3000):
        assert factor_sizes(n) == (None if n % 4 == 2 else sizes_of_vllm_ascend(n)), n
    assert [factor_sizes(n) for n in (4096, 11008, 14336)] == [(64, 64), (86, 128), (112, 128)]


def product(tensors, name, x):
    """What AscendW4A4FlatQuantDynamicLinearMethod computes of x [m, k] in float32."""
    part = {key: tensors[f"{name}.{key}"] for key in (
        "weight", "weight_scale", "weight_offset", "left_trans", "right_trans", "clip_ratio")}
    assert part["weight"].dtype == np.int8
    assert np.abs(part["weight"]).max() <= 8
    assert part["weight_scale"].shape == part["weight_offset"].shape == (len(part["weight"]), 1)
    assert not part["weight_offset"].any()
    left = part["left_trans"].astype(np.float32).T  # process_weights_after_loading
    right = part["right_trans"].astype(np.float32)
    assert (len(left), len(right)) == sizes_of_vllm_ascend(x.shape[1])
    turned = (left @ x.reshape(-1, len(left), len(right)) @ right).reshape(x.shape)
    scale = part["clip_ratio"] * np.abs(turned).max(1, keepdims=True) / 7
    codes = np.clip(np.rint(turned / scale), -8, 7)
    return codes * scale @ (part["weight"] * part["weight_scale"]).T


@pytest.mark.parametrize("method", TWO_FACTORS)
def test_formulas_give_our_linears(method, square, tmp_path):
    packed = quantized(square, tmp_path / "packed", method=method)
    out = sq.export(packed, "flatquant", tmp_path / "out", dtype="float32")
    tensors, checkpoint = stored(out), load_checkpoint(packed)
    rng = np.random.default_rng(0)
    for site in checkpoint.spec.layer(1).sites.values():
        layer, x = checkpoint.layer(1), rng.standard_normal((9, site.k)).astype(np.float32)
        for role in site.roles:
            linear = layer.linears[role]
            packed_weight = _C.PackedWeight(linear.weight.words, linear.weight.scales, site.k)
            expected = _C.linear(x, packed_weight, 4, layer.clips.get(site.name, 0.75),
                                 layer.rotations.get(site.name))
            found = product(tensors, linear.name, x)
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            assert error < 0.01, (site.name, role)  # a code at a half may go either way


def test_description_and_types(square, tmp_path):
    packed = quantized(square, tmp_path / "packed", ignore=("*.1.mlp.down_proj",))
    out = sq.export(packed, "flatquant", tmp_path / "out")
    tensors = stored(out)
    said = json.loads((out / "quant_model_description.json").read_text())
    assert said.pop("model_quant_type") == KIND
    assert said.pop("lm_head.weight") == "FLOAT"  # tied: it has no tensor
    assert said.keys() == tensors.keys()
    dense = ["model.embed_tokens.weight", "model.norm.weight",
             "model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"]
    assert {said[name] for name in dense} == {"FLOAT"}
    up = "model.layers.0.mlp.up_proj"
    assert {said[f"{up}.{part}"] for part in ("weight", "left_trans", "clip_ratio")} == {KIND}
    assert tensors[f"{up}.left_trans"].dtype == ml_dtypes.bfloat16
    assert tensors[f"{up}.weight_scale"].dtype == np.float32
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["transformers_weights"].startswith("none; vLLM-Ascend reads this folder")
    with pytest.raises(sq.FormatError):
        sq.load(out)


@pytest.mark.parametrize(("options", "message"), [
    ({"scheme": "w4a8"}, "flatquant: expected w4a4, found w4a8"),
    ({"group_size": 32}, "expected a scale for each output channel, found groups of 32"),
    ({"bits": 5}, "flatquant: expected 4 bits, found 5"),
    ({"method": "balanced"}, r"layer 0: \w+: expected inputs of 4 bits, found \d+ with 8"),
    ({"method": "cat"}, r"layer 0: \w+: expected a left and a right factor, found an alignment"),
    ({"method": "duquant"}, r"expected a left and a right factor, found a rotation in blocks"),
])
def test_what_it_cannot_say_is_refused_and_nothing_is_left(options, message, square, tmp_path):
    packed = quantized(square, tmp_path / "packed", **options)
    with pytest.raises(ValueError, match=message):
        sq.export(packed, "flatquant", tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_width_that_splits_otherwise_is_refused_with_both_splits(tmp_path):
    folder = make_checkpoint(tmp_path / "model", intermediate=96)
    packed = quantized(folder, tmp_path / "packed")
    sizes = _C.factor_sizes(96)
    assert sizes != factor_sizes(96)
    with pytest.raises(ValueError, match=r"layer 0: down: expected factors of 8 and 12, as vLLM-"
                       rf"Ascend splits 96 inputs, found {sizes[0]} and {sizes[1]}"):
        sq.export(packed, "flatquant", tmp_path / "out")
