# SPDX-License-Identifier: Apache-2.0
"""The packed folder: what the writer refuses, and every way a packed folder can lie."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import random_factor, random_layer, write_json
from ml_dtypes import bfloat16
from packed_folders import CONFIG, ORDERS, Q0, edit_tensors, partial, write

from singlequant._C import FormatError
from singlequant.checkpoint.folder import Checkpoint, load_checkpoint
from singlequant.config import QuantConfig
from singlequant.export.writer import ModelWriter
from singlequant.rotations import Factor, SiteRotation
from singlequant.weights import PackedLinear

NORM = "model.layers.0.input_layernorm.weight"


# ---- what the writer refuses --------------------------------------------------------------------


def test_group_size_that_divides_no_row_is_refused_before_any_work(source, out):
    config = QuantConfig("w4a4", bits=4, group_size=64)
    with pytest.raises(ValueError, match=r"divisor of model\.layers\.0\.mlp\.down_proj's 96"):
        ModelWriter(out, source, config)
    ModelWriter(out, source, QuantConfig("w4a4", bits=4, group_size=64, ignore=("*.down_proj",)))
    assert not partial(out).exists()


def test_pattern_that_matches_no_linear_is_refused_before_any_work(source, out):
    config = QuantConfig("w4a4", bits=4, ignore=("*.q_proj", "nomatch*"))
    with pytest.raises(ValueError, match=r"ignore: 'nomatch\*' matches no linear of the model"):
        ModelWriter(out, source, config)


def test_packed_model_is_not_packed_again(source, out, tmp_path):
    write(source, out)
    with pytest.raises(ValueError, match="expected an unquantized model"):
        ModelWriter(tmp_path / "again", load_checkpoint(out), CONFIG)


def test_layer_that_is_not_the_models_is_refused(source, out):
    layer, _ = random_layer(source, CONFIG, 0)
    make = type(layer)
    packed = {name: linear for name, linear in layer.packed.items() if name != Q0}
    short = PackedLinear(np.zeros((8, 8), np.int32), np.ones((8, 1), np.float32), (8, 64), 0)
    ids = layer.dense[NORM].astype(np.int32)
    wrong = SiteRotation(Factor.identity(8), random_factor(np.random.default_rng(0), 4))
    cases = [
        (make(0, packed, layer.dense, {}), rf"{Q0}: expected \(64, 64\), found none"),
        (make(0, {**packed, Q0: short}, layer.dense, {}), rf"{Q0}: .* found \(8, 64\)"),
        (make(0, layer.packed, {}, {}), "input_layernorm.weight: .* found none"),
        (make(0, layer.packed, {**layer.dense, NORM: ids}, {}), f"{NORM}: expected .* found int32"),
        (make(0, layer.packed, {**layer.dense, "x": np.ones(2)}, {}), "x: expected no such"),
        (make(0, layer.packed, layer.dense, {"o": wrong}), "o: expected a rotation of 64 inputs"),
        (make(2, layer.packed, layer.dense, {}), "layer: expected 0 to 1, found 2"),
        (make(0, layer.packed, layer.dense, {"qk": wrong}), "rotations: expected .* found 'qk'"),
    ]
    with ModelWriter(out, source, CONFIG) as writer:
        for bad, message in cases:
            with pytest.raises(ValueError, match=message):
                writer.write_layer(bad)


# ---- packed folders that lie --------------------------------------------------------------------


@pytest.fixture
def packed(source: Checkpoint, out: Path) -> Path:
    write(source, out, orders=ORDERS, clips={"qkv": 0.5})
    return out


LEFT = "model.layers.0.rotations.qkv.left"
ALIGN = "model.layers.0.rotations.qkv.align"
CLIP = "model.layers.0.activations.qkv.clip"
HIGH = "model.layers.0.activations.qkv.high"
NAN = np.full((64, 1), np.nan, np.float32)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{Q0}.weight_packed", np.zeros((64, 8), np.int64), "expected dtype I32, found I64"),
        (f"{Q0}.weight_packed", np.zeros((64, 9), np.int32), r"\[64, 8\], found \[64, 9\]"),
        (f"{Q0}.weight_packed", None, "q_proj.weight: missing tensor"),
        (f"{Q0}.weight_bits", np.array([4]), "weight_bits: expected 5 or 6 or 8, found 4"),
        (f"{Q0}.weight_bits", np.array([7]), "weight_bits: expected 5 or 6 or 8, found 7"),
        (f"{Q0}.weight_bits", np.array([-(2**62)]), "weight_bits: expected 5 or 6 or 8"),
        (f"{Q0}.weight_bits", np.array([5]), r"weight_packed: expected shape \[64, 10\], found"),
        (f"{Q0}.weight_bits", np.array([8], np.int32), "expected dtype I64, found I32"),
        (f"{Q0}.weight_bits", np.array([8, 8]), r"expected shape \[1\], found \[2\]"),
        (f"{Q0}.weight_scale", np.ones((64, 1), bfloat16), "expected dtype F32, found BF16"),
        (f"{Q0}.weight_scale", None, "q_proj.weight_scale: missing tensor"),
        (f"{Q0}.weight_scale", np.ones((64, 2), np.float32), r"shape \[64, 1\], found \[64, 2\]"),
        (f"{Q0}.weight_scale", NAN, "expected finite scales of at least 0"),
        (f"{Q0}.weight_scale", -np.ones((64, 1), np.float32), "expected finite scales"),
        (f"{Q0}.weight_shape", np.array([64, 63]), r"weight_shape: expected \[64, 64\]"),
        (f"{Q0}.weight", np.zeros((64, 64), np.float16), "weight or weight_packed, found both"),
        (LEFT, np.ones((8, 8), np.float32), "expected an orthogonal matrix"),
        (LEFT, np.full((8, 8), np.nan, np.float32), "expected an orthogonal matrix"),
        (LEFT, np.full((8, 8), 1e30, np.float32), "expected an orthogonal matrix"),
        (LEFT, np.eye(4, dtype=np.float32), "orders whose product is 64, found 4 x 8"),
        (LEFT, np.ones((8, 4), np.float32), r"expected shape \[8, 8\], found \[8, 4\]"),
        (LEFT, np.array(1, np.float32), r"left: expected shape \[1, 1\]"),
        (LEFT, np.eye(8), "expected dtype F32, found F64"),
        (LEFT, np.eye(513, dtype=np.float32), "an order of at most 512, found 513"),
        (LEFT, None, "rotations.qkv.right: unexpected tensor"),
        (LEFT.replace("left", "right"), None, "rotations.qkv.right: missing tensor"),
        (LEFT.replace("qkv", "kv"), np.eye(8, dtype=np.float32), "unexpected tensor"),
        (ALIGN, np.zeros((8, 8, 8), np.float16), "align: expected invertible matrices"),
        (ALIGN, np.full((8, 8, 8), np.nan, np.float32), "align: expected invertible matrices"),
        (ALIGN, np.ones((4, 8, 8), np.float32), r"align: expected shape \[8, 8, 8\]"),
        (ALIGN, np.ones((8, 8, 8)), "align: expected dtype F16 or F32, found F64"),
        (ALIGN, np.array(1, np.float16), r"align: expected shape \[64, 1, 1\]"),
        (ALIGN.replace("qkv", "kv"), np.ones((8, 8, 8), np.float16), "unexpected tensor"),
        (LEFT + "_chain", np.array([8, 1]), "left_pairs: missing tensor"),
        (CLIP, np.array([1.5], np.float32), r"clip: expected a number in \(0, 1\], found 1\.5"),
        (CLIP, np.array([np.nan], np.float32), "clip: expected a number"),
        (CLIP, np.ones(2, np.float32), r"expected shape \[1\], found \[2\]"),
        (HIGH, np.array([16]), "qkv.high: expected a multiple of 32 below 64, found 16"),
        (HIGH, np.array([64]), "qkv.high: expected a multiple of 32 below 64, found 64"),
        (HIGH, np.array([-32]), "qkv.high: expected a multiple of 32 below 64, found -32"),
        (HIGH, np.array([2**62]), "qkv.high: expected a multiple of 32 below 64"),
        (HIGH, np.array([32], np.int32), "qkv.high: expected dtype I64, found I32"),
        (HIGH, np.array([32.0]), "qkv.high: expected dtype I64, found F64"),
        (HIGH, np.array(32), r"expected shape \[1\], found \[\]"),
        (HIGH, np.array([32, 32]), r"expected shape \[1\], found \[2\]"),
        (HIGH, np.zeros(0, np.int64), r"expected shape \[1\], found \[0\]"),
        (HIGH.replace("qkv", "kv"), np.array([32]), "unexpected tensor"),
        (HIGH.replace("0.a", "2.a"), np.array([32]), "unexpected tensor"),
    ],
)
def test_packed_tensors_that_lie_are_refused(packed, name, value, message):
    edit_tensors(packed, **{name: value})
    with pytest.raises(FormatError, match=message):
        load_checkpoint(packed).layer(0)


@pytest.mark.parametrize(
    ("config", "high", "message"),
    [
        (QuantConfig(bits=4, scheme="w4a8"), 32, "qkv.high: expected 0 with w4a8, found 32"),
        (QuantConfig(bits=4, scheme="w4a16"), 32, "qkv.high: expected 0 with w4a16, found 32"),
        (QuantConfig("w4a4", bits=4, group_size=64), 32,
         "qkv.high: expected a multiple of 64 below 128, found 32"),
        (QuantConfig("w4a4", bits=4, group_size=64), 128,
         "qkv.high: expected a multiple of 64 below 128"),
    ],
)
def test_high_inputs_that_do_not_suit_the_scheme_are_refused(
    make_checkpoint, tmp_path, out, config, high, message
):
    source = load_checkpoint(make_checkpoint(tmp_path / "model", hidden=128, intermediate=128))
    write(source, out, config)
    edit_tensors(out, **{HIGH: np.array([high])})
    with pytest.raises(FormatError, match=message):
        load_checkpoint(out).layer(0)


def test_high_inputs_survive_writing_and_zero_takes_no_tensor(source, out):
    layers = [random_layer(source, CONFIG, i)[0] for i in range(2)]
    high = {"qkv": 32, "o": 0, "down": 64}
    with ModelWriter(out, source, CONFIG) as writer:
        writer.write_layer(dataclasses.replace(layers[0], int8_inputs=high))
        writer.write_layer(layers[1])
        writer.finish()
    packed = load_checkpoint(out)
    assert packed.layer(0).int8_inputs == {"qkv": 32, "o": 0, "gate_up": 0, "down": 64}
    assert packed.layer(1).int8_inputs == dict.fromkeys(("qkv", "o", "gate_up", "down"), 0)
    names = [name for name in packed.tensors if name.endswith(".high")]
    assert names == [HIGH.replace("qkv", "down"), HIGH]


@pytest.mark.parametrize(("high", "message"), [
    ({"qkv": 16}, "layer 0: qkv: int8_inputs: expected a multiple of 32 below 64, found 16"),
    ({"o": 64}, "layer 0: o: int8_inputs: expected a multiple of 32 below 64, found 64"),
    ({"kv": 32}, "layer 0: int8_inputs: expected keys among qkv, .* found 'kv'"),
])
def test_high_inputs_of_no_whole_block_are_not_written(source, out, high, message):
    layer = dataclasses.replace(random_layer(source, CONFIG, 0)[0], int8_inputs=high)
    with ModelWriter(out, source, CONFIG) as writer, pytest.raises(ValueError, match=message):
        writer.write_layer(layer)


CHAIN = "model.layers.0.rotations.down.left"


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("chain", np.array([512, 1]), r"\(order above 512, 0 or 1\), found \(512, 1\)"),
        ("chain", np.array([-521, 1]), "order above 512"),
        ("chain", np.array([521, 2]), r"found \(521, 2\)"),
        ("chain", np.array([2**62, 1]), "orders whose product is 1042"),
        ("chain", np.array([521, 1, 0]), r"expected shape \[2\], found \[3\]"),
        ("pairs", np.full((1042, 2), 521, np.int32), r"below 521, found \(521, 521\) at step 0"),
        ("pairs", np.zeros((1042, 2), np.int32), "two different indices"),
        ("pairs", np.zeros((1041, 2), np.int32), r"\[1042, 2\], found \[1041, 2\]"),
        ("angles", np.full(1042, np.inf), "expected finite angles"),
        ("angles", None, "left_pairs: expected shape"),
    ],
)
def test_chains_that_lie_are_refused(make_checkpoint, tmp_path, out, part, value, message):
    source = load_checkpoint(make_checkpoint(tmp_path / "model", intermediate=1042))
    write(source, out, orders={"down": (521, 2)})
    edit_tensors(out, **{f"{CHAIN}_{part}": value})
    with pytest.raises(FormatError, match=message):
        load_checkpoint(out).layer(0)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_tail_that_is_not_zero_is_refused(make_checkpoint, tmp_path, out, bits):
    source = load_checkpoint(make_checkpoint(tmp_path / "model", intermediate=90))
    write(source, out, bits={"mlp.down_proj": bits})
    name = "model.layers.0.mlp.down_proj.weight_packed"
    words = load_checkpoint(out).tensor(name).copy()
    load_checkpoint(out).layer(0)
    words[3, -1] ^= np.int32(1 << 90 * bits % 32)  # the first bit behind column 89
    edit_tensors(out, **{name: words})
    with pytest.raises(FormatError, match="expected code 0 in the tail"):
        load_checkpoint(out).layer(0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 3, "format_version: expected 1 or 2, found 3"),
        ("format_version", "1", "format_version: expected 1 or 2, found '1'"),
        ("format_version", True, "format_version: expected 1 or 2, found True"),
        ("model", None, "quantization_config.model: expected an object, found None"),
        ("model", [], r"quantization_config.model: expected an object, found \[\]"),
        ("scheme", "w2a2", "scheme: expected one of"),
        ("method", 3, "method: expected one of"),
        ("weights", {"bits": 8}, "quantization_config: "),
        ("activations", None, "quantization_config: clip: expected a number"),
        ("ignore", 3, "ignore: expected a list of patterns, found 3"),
        ("ignore", "*", "ignore: expected a list"),
        ("kv_bits", 3, "kv_bits: expected one of 4, 8, 16, found 3"),
        ("kv_bits", 32, "kv_bits: expected one of 4, 8, 16, found 32"),
        ("kv_bits", True, "kv_bits: expected one of 4, 8, 16, found True"),
        ("kv_bits", None, "kv_bits: expected one of 4, 8, 16, found None"),
    ],
)
def test_quantization_config_that_lies_is_refused(packed, key, value, message):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"][key] = value
    write_json(packed / "config.json", config)
    with pytest.raises(FormatError, match=message):
        load_checkpoint(packed)


def test_unquantized_config_with_packed_weights_is_refused(packed):
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    write_json(packed / "config.json", config)
    with pytest.raises(FormatError, match=r"embed_tokens\.weight: missing tensor"):
        load_checkpoint(packed)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"],
)
def test_random_damage_is_a_format_error_or_harmless(packed, name):
    """Bytes of JSON and of headers are changed at random: nothing but FormatError may come."""
    rng = np.random.default_rng(0)
    raw = (packed / name).read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little") if name.endswith(".safetensors") else len(raw)
    refused = 0
    for _ in range(100):
        damaged = bytearray(raw)
        for at in rng.integers(0, header, rng.integers(1, 5)):
            damaged[at] = rng.choice(bytearray(b'0123456789-{}[]",:.eE \xff\x00'))
        (packed / name).write_bytes(damaged)
        try:
            load_checkpoint(packed).layer(0)
        except FormatError:
            refused += 1
    assert refused > 50
