# SPDX-License-Identifier: Apache-2.0
"""Reading model folders: roles and shapes, laziness, and every way a folder can lie."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DTYPES, write_json, write_weights
from safetensors.numpy import load_file

import singlequant as sq
from singlequant._C import FormatError
from singlequant.checkpoint.folder import Checkpoint, load_checkpoint
from singlequant.config import QuantConfig
from singlequant.models.families import FAMILIES
from singlequant.models.family import Stored

MakeCheckpoint = Callable[..., Path]
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


# ---- what a sound folder gives ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_load_checkpoint_gives_the_tensors_written(make_checkpoint, tmp_path, dtype, shards):
    path = make_checkpoint(tmp_path / "model", dtype=dtype, shards=shards, tie=False, bias=True)
    checkpoint = load_checkpoint(path)
    files = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    written = {name: tensor for file in files for name, tensor in file.items()}
    assert set(written) == set(dict(checkpoint.spec.tensors()))
    for name, tensor in written.items():
        found = checkpoint.tensor(name)
        assert found.dtype == tensor.dtype == DTYPES[dtype]
        assert found.tobytes() == tensor.tobytes()
        assert not found.flags.writeable
    assert checkpoint.bytes_on_disk == sum(f.stat().st_size for f in path.glob("*.safetensors"))
    assert checkpoint.dtype == dtype
    assert not checkpoint.quantized


def test_layer_names_roles_in_the_decoders_order(make_checkpoint, tmp_path):
    path = make_checkpoint(
        tmp_path / "model", hidden=48, heads=3, kv_heads=1, head_dim=32, bias=True, layers=3
    )
    layer = load_checkpoint(path).layer(2)
    assert layer.index == 2
    assert {role: linear.weight.shape for role, linear in layer.linears.items()} == {
        "q": (96, 48),
        "k": (32, 48),
        "v": (32, 48),
        "o": (48, 96),
        "gate": (96, 48),
        "up": (96, 48),
        "down": (48, 96),
    }
    assert list(layer.linears) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert layer.linears["down"].name == "model.layers.2.mlp.down_proj"
    assert all(linear.bias.shape == linear.weight.shape[:1] for linear in layer.linears.values())
    assert {place: norm.weight.shape for place, norm in layer.norms.items()} == {
        "before_attention": (48,), "before_mlp": (48,)}
    assert layer.rotations == {}
    with pytest.raises(IndexError, match="expected 0 to 2, found 3"):
        load_checkpoint(path).layer(3)


def test_tied_head_is_the_embedding(make_checkpoint, tmp_path):
    tied = load_checkpoint(make_checkpoint(tmp_path / "tied"))
    assert np.shares_memory(tied.head, tied.embedding)
    untied = load_checkpoint(make_checkpoint(tmp_path / "untied", tie=False))
    assert not np.array_equal(untied.head, untied.embedding)
    assert untied.spec.parameters - tied.spec.parameters == 320 * 64


def test_written_copy_of_a_tied_head_is_ignored(model):
    tensors = load_file(model / FILE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    write_weights(model, tensors, 1)
    assert load_checkpoint(model).spec.tied


def test_repr_is_short_and_says_what_it_is(model):
    text = repr(load_checkpoint(model))
    assert text.startswith("Checkpoint('model', LlamaForCausalLM, 2 layers, hidden 64")
    assert len(text) < 120


def test_tokenizer_round_trips_text(model):
    tokenizer = load_checkpoint(model).tokenizer
    ids = tokenizer.encode("naïve foxes — 狐").ids
    assert ids[0] == 0
    assert max(ids) < 320
    assert tokenizer.decode(ids) == "naïve foxes — 狐"


def test_tokenizer_missing_or_broken_is_a_clear_error(model):
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        _ = load_checkpoint(model).tokenizer
    (model / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"tokenizer\.json: no such file"):
        _ = load_checkpoint(model).tokenizer


def test_fingerprint_sees_a_changed_weight_and_not_a_copy(make_checkpoint, tmp_path):
    a = load_checkpoint(make_checkpoint(tmp_path / "a"))
    b = load_checkpoint(make_checkpoint(tmp_path / "b"))
    c = load_checkpoint(make_checkpoint(tmp_path / "c", seed=1))
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_shards_may_be_symbolic_links(make_checkpoint, tmp_path):
    path = make_checkpoint(tmp_path / "model", shards=2)
    (tmp_path / "blobs").mkdir()
    for file in path.glob("*.safetensors"):
        blob = tmp_path / "blobs" / file.stem
        os.rename(file, blob)
        file.symlink_to(blob)
    assert load_checkpoint(path).embedding.shape == (320, 64)


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("needs RssAnon in /proc/self/status")


def test_tensors_stay_in_the_file(make_checkpoint, tmp_path):
    """Reading all of 40 MB of weights must not make 40 MB of memory ours."""
    path = make_checkpoint(
        tmp_path / "model", hidden=1024, intermediate=2816, layers=2, dtype="bfloat16"
    )
    before = anonymous_bytes()
    checkpoint = load_checkpoint(path)
    views = [checkpoint.tensor(name) for name in checkpoint.tensors]
    touched = sum(int(view.reshape(-1).view(np.uint16)[::64].max()) for view in views)
    grown = anonymous_bytes() - before
    assert touched > 0
    assert checkpoint.bytes_on_disk > 40_000_000
    assert grown < 8_000_000


def test_encode_gives_the_tokenizers_ids(model):
    checkpoint = load_checkpoint(model)
    ids = checkpoint.encode("the fox")
    assert ids.dtype == np.int64
    assert ids.tolist() == [0, *checkpoint.encode("the fox", special=False)]  # <s>
    assert checkpoint.tokenizer.decode(ids.tolist()) == "the fox"
    assert checkpoint.encode("", special=False).shape == (0,)


def test_encode_neither_truncates_nor_pads(model):
    tokenizer, text = load_checkpoint(model).tokenizer, "the quick brown fox " * 9
    whole = tokenizer.encode(text).ids
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=512)
    tokenizer.save(str(model / "tokenizer.json"))
    assert load_checkpoint(model).encode(text).tolist() == whole


def test_encode_names_a_token_outside_the_vocabulary(model):
    checkpoint = load_checkpoint(model)
    vocab = checkpoint.spec.vocab
    checkpoint.tokenizer.add_tokens(["Zq"])
    first = checkpoint.tokenizer.token_to_id("Zq")
    edit_config(model, vocab_size=first)
    tensors = load_file(model / FILE)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:first]
    write_weights(model, tensors, 1)
    checkpoint.tokenizer.save(str(model / "tokenizer.json"))
    assert first <= vocab
    message = rf"tokenizer\.json: token 'Zq' has id {first}, but config\.json's vocab_size is "
    with pytest.raises(ValueError, match=f"{message}{first}$"):
        load_checkpoint(model).encode("a Zq b")


def test_encode_refuses_text_that_is_not_unicode(model):
    with pytest.raises(ValueError, match="text: expected valid Unicode, found a lone surrogate"):
        load_checkpoint(model).encode("a\ud800b")


def test_reference_model_is_read(reference_model):
    checkpoint = load_checkpoint(reference_model)
    assert (checkpoint.spec.layers, checkpoint.spec.hidden, checkpoint.dtype) == (
        8,
        512,
        "float16",
    )
    assert checkpoint.spec.parameters == 25_698_816
    assert checkpoint.tokenizer.get_vocab_size() == checkpoint.spec.vocab


# ---- config.json --------------------------------------------------------------------------------


def edit_config(path: Path, remove: tuple[str, ...] = (), **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    write_json(
        path / "config.json", {k: v for k, v in {**config, **values}.items() if k not in remove}
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "LlamaForCausalLM, Mistral.*'GPT2LMHeadModel'"),
        ({"architectures": None}, "architectures: expected one of .* found None"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures: expected one of"),
        ({"hidden_size": -64}, "hidden_size: expected an integer from 1 .* found -64"),
        ({"hidden_size": 0}, "hidden_size: .* found 0"),
        ({"hidden_size": True}, "hidden_size: .* found True"),
        ({"hidden_size": 64.0}, r"hidden_size: .* found 64\.0"),
        ({"vocab_size": 2**31}, "vocab_size: .* found 2147483648"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: .* found '2'"),
        ({"num_attention_heads": 6}, "num_attention_heads: expected a divisor of hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of .* found 3"),
        ({"head_dim": 15}, "head_dim: expected an even number, found 15"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number"),
        ({"rope_theta": float("inf")}, "rope_theta: expected a number"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: expected 1 .* found 0\.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type: .* found 'yarn'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "found 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type.*'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a number"),
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


def test_keys_that_nothing_reads_are_refused_where_they_are_on():
    for off in (None, False, 0, "", []):
        assert shape_of(rope_interleaved=off) == shape_of()
    assert shape_of(_name_or_path="x", hidden_dropout=0.1, unsloth_version="1") == shape_of()
    with pytest.raises(FormatError, match=r"rope_interleaved: expected no such key.* found True"):
        shape_of(rope_interleaved=True)
    with pytest.raises(FormatError, match="use_sliding_window: expected no such key"):
        shape_of(architecture="Qwen2ForCausalLM", use_sliding_window=True, num_key_value_heads=4)


FUSED = dataclasses.replace(
    FAMILIES["LlamaForCausalLM"],
    fused=(Stored("model.layers.{i}.self_attn.qkv_proj", ("q", "k", "v")),
           Stored("model.layers.{i}.mlp.gate_up_proj", ("gate", "up"))),
)


def test_fused_tensors_are_seen_by_role(make_checkpoint, tmp_path, monkeypatch):
    """A row that stores rows of several roles in one tensor gives the same model."""
    plain = load_checkpoint(make_checkpoint(tmp_path / "plain", bias=True))
    path = make_checkpoint(tmp_path / "fused", bias=True)
    tensors = load_file(path / FILE)
    for i in range(2):
        for block, name, roles in (("self_attn", "qkv_proj", "qkv"), ("mlp", "gate_up_proj",
                                                                      ("gate", "up"))):
            for part in ("weight", "bias"):
                parts = [tensors.pop(f"model.layers.{i}.{block}.{r}_proj.{part}") for r in roles]
                tensors[f"model.layers.{i}.{block}.{name}.{part}"] = np.concatenate(parts)
    write_weights(path, tensors, 1)
    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", FUSED)
    fused = load_checkpoint(path)
    assert fused.linear_name(1, "k") == "model.layers.1.self_attn.qkv_proj.k"
    for role, linear in plain.layer(1).linears.items():
        np.testing.assert_array_equal(fused.layer(1).linears[role].weight, linear.weight)
        np.testing.assert_array_equal(fused.layer(1).linears[role].bias, linear.bias)
    out = sq.quantize_folder(path, tmp_path / "out", QuantConfig(weights="rtn")).out
    monkeypatch.undo()  # a packed folder tells by itself what it is
    packed = load_checkpoint(out)
    assert packed.spec == fused.spec.separate()
    tokens = np.arange(20).reshape(1, 20)
    expected = sq.quantize_folder(tmp_path / "plain", tmp_path / "o2", QuantConfig(weights="rtn"))
    expected = sq.load(expected.out).forward(tokens)
    np.testing.assert_array_equal(sq.load(out).forward(tokens), expected)


def packed_folder(model: Path, tmp_path: Path) -> Path:
    config = QuantConfig(weights="rtn", method="hadamard", calibration_tokens=64)
    return sq.quantize_folder(model, tmp_path / "packed", config).out


def test_packed_folder_needs_no_row_of_its_family(model, tmp_path, monkeypatch):
    out = packed_folder(model, tmp_path)
    expected = sq.load(out).forward(np.arange(8).reshape(1, 8))
    edit_config(out, architectures=["SomethingElse"], hidden_size=7, num_hidden_layers=99)
    monkeypatch.setattr("singlequant.models.families.FAMILIES", {})
    np.testing.assert_array_equal(sq.load(out).forward(np.arange(8).reshape(1, 8)), expected)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("hidden",), 32, r"linears.q.k: expected 32, as the blocks ask for, found 64"),
        (("layers",), 3, "model.layers.2.* missing tensor"),
        (("layers",), 2**31 - 1, "model.layers.2.* missing tensor"),
        (("pattern",), [1], r"pattern: expected indices of 1 kinds, found \[1\]"),
        (("pattern",), [], r"pattern: expected indices of 1 kinds, found \[\]"),
        (("kinds",), [], "kinds: expected a list of objects"),
        (("embed",), "model.norm", r"model.norm.weight: expected shape \[320, 64\]"),
        (("tied",), 1, "tied: expected true or false, found 1"),
        (("kinds", 0, "attention", "heads"), 3, "kv_heads: expected a divisor of heads = 3"),
        (("kinds", 0, "attention", "head_dim"), 32, "linears.q.n: expected 128"),
        (("kinds", 0, "attention", "scale"), float("nan"), "scale: expected a number"),
        (("kinds", 0, "attention", "rotary", "inv_freq"), [1.0] * 9, "expected 1 to 8 frequencies"),
        (("kinds", 0, "attention", "rotary", "inv_freq"), ["x"], "expected finite numbers"),
        (("kinds", 0, "mlp", "activation"), "tanh", "activation: expected one of silu"),
        (("kinds", 0, "linears", "q", "name"), "{i.__class__}", "missing tensor"),
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


# ---- files that lie -----------------------------------------------------------------------------


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any], tail: bytes = b"") -> None:
    """Rewrites a safetensors file's header; edit may return a replacement."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    replaced = edit(header)
    text = json.dumps(header if replaced is None else replaced).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :] + tail)


def set_entry(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[Q0].__setitem__(key, value)


def shift(header: dict[str, Any], by: int) -> None:
    begin, end = header[Q0]["data_offsets"]
    header[Q0]["data_offsets"] = [begin + by, end + by]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_entry("dtype", "F7"), f"{Q0}: unknown dtype 'F7'"),
        (set_entry("dtype", ["F16"]), f"{Q0}: unknown dtype"),
        (set_entry("dtype", "I16"), f"{Q0}: expected dtype F32 or F16 or BF16, found I16"),
        (set_entry("shape", [64, 65]), rf"{Q0}: F16 \[64, 65\] takes 8320 bytes.* 8192"),
        (set_entry("shape", [32, 128]), rf"{Q0}: expected shape \[64, 64\], found \[32, 128\]"),
        (set_entry("shape", [-64, -64]), f"{Q0}: shape: expected sizes"),
        (set_entry("shape", [2**63, 2]), f"{Q0}: shape: expected sizes"),
        (set_entry("shape", [2**61, 2**61]), f"{Q0}: F16 .* takes"),
        (set_entry("shape", "64"), f"{Q0}: shape: expected sizes"),
        (set_entry("data_offsets", [0, 1, 2]), f"{Q0}: data_offsets"),
        (set_entry("data_offsets", [8192, 0]), f"{Q0}: F16 .* takes 8192 bytes"),
        (lambda h: shift(h, -8), "overlaps the tensor before it"),
        (lambda h: shift(h, 8), "leaves a gap before it"),
        (lambda h: shift(h, 2**40), "leaves a gap before it"),
        (lambda h: h.pop(Q0) and None, "leaves a gap before it|bytes of no tensor follow"),
        (lambda h: h.__setitem__(Q0, 3), f"{Q0}: expected an object, found 3"),
        (lambda h: [h], "header: expected an object, found list"),
    ],
)
def test_header_that_lies_is_refused(model, edit, message):
    edit_header(model / FILE, edit)
    with pytest.raises(FormatError, match=f"{FILE}: .*({message})"):
        load_checkpoint(model)


def test_header_that_names_a_tensor_twice_is_refused(model):
    raw = (model / FILE).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    name = json.dumps(Q0).encode()
    text = raw[8 : 8 + length].rstrip()[:-1] + b"," + name + b":{}}"
    (model / FILE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    with pytest.raises(FormatError, match=f"header: key '{Q0}' stands twice"):
        load_checkpoint(model)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -4096])
def test_truncated_file_is_refused(model, keep):
    raw = (model / FILE).read_bytes()
    (model / FILE).write_bytes(raw[:keep])
    with pytest.raises(FormatError, match=r"model\.safetensors: .*(truncated|the file has)"):
        load_checkpoint(model)


def test_bytes_after_the_last_tensor_are_refused(model):
    edit_header(model / FILE, lambda header: None, tail=b"more")
    with pytest.raises(FormatError, match="bytes of no tensor follow"):
        load_checkpoint(model)


def test_header_length_beyond_the_limit_is_refused_unread(model):
    (model / FILE).write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(FormatError, match="its header should take 9223372036854775808 bytes"):
        load_checkpoint(model)


def test_tensor_of_another_model_is_refused(model):
    tensors = load_file(model / FILE)
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float16)
    write_weights(model, tensors, 1)
    with pytest.raises(FormatError, match=r"q_norm\.weight: unexpected tensor"):
        load_checkpoint(model)


# ---- folders that lie ---------------------------------------------------------------------------


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FormatError, match="nowhere: no such folder"):
        load_checkpoint(tmp_path / "nowhere")


def test_missing_config_is_named(model):
    (model / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config\.json: no such file"):
        load_checkpoint(model)


def test_folder_without_weights_is_refused(model):
    (model / FILE).unlink()
    with pytest.raises(FormatError, match="expected model.safetensors or .* found no safetensors"):
        load_checkpoint(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt"])
def test_pickled_weights_are_refused_with_the_way_out(model, name):
    (model / FILE).rename(model / name)
    with pytest.raises(FormatError, match=f"{name}: pickled weights are refused.*save_pretrained"):
        load_checkpoint(model)


@pytest.fixture
def sharded(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", shards=3)


SHARD2 = "model-00002-of-00003.safetensors"


def edit_index(path: Path, name: str, file: Any) -> None:
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][name] = file
    write_json(path / INDEX, index)


def test_missing_shard_is_named(sharded):
    (sharded / SHARD2).unlink()
    with pytest.raises(FormatError, match=f"{SHARD2}: no such file"):
        load_checkpoint(sharded)


def test_shards_without_their_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    with pytest.raises(FormatError, match=r"found model-00001-of-00003\.safetensors.* without"):
        load_checkpoint(sharded)


@pytest.mark.parametrize(
    "file", ["../model/" + SHARD2, "/etc/passwd", "..", "", ".", "a/b", "a\\b", "a\0b", 3, None]
)
def test_index_that_leaves_the_folder_is_refused(sharded, file):
    edit_index(sharded, Q0, file)
    with pytest.raises(FormatError, match=f"{INDEX}: {Q0}: expected the name of a file in this"):
        load_checkpoint(sharded)


def test_index_that_names_the_wrong_shard_is_refused(sharded):
    edit_index(sharded, "model.norm.weight", SHARD2)
    with pytest.raises(FormatError, match=rf"model\.norm\.weight: expected in {SHARD2}, found in"):
        load_checkpoint(sharded)


def test_index_that_names_an_unknown_tensor_is_refused(sharded):
    edit_index(sharded, "model.extra", SHARD2)
    with pytest.raises(FormatError, match=rf"model\.extra: expected in {SHARD2}, found in no file"):
        load_checkpoint(sharded)


@pytest.mark.parametrize("values", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_index_without_a_map_is_refused(sharded, values):
    write_json(sharded / INDEX, values)
    with pytest.raises(FormatError, match=f"{INDEX}: weight_map: expected an object"):
        load_checkpoint(sharded)


def test_tensor_in_two_shards_is_refused(sharded):
    (sharded / "model-00003-of-00003.safetensors").unlink()
    os.link(sharded / SHARD2, sharded / "model-00003-of-00003.safetensors")
    with pytest.raises(FormatError, match="model-00003.*: duplicate, also in model-00002"):
        load_checkpoint(sharded)


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
    write_json(tmp_path / "recipe.json", {"scheme": "w4a4", "bits": 4})
    with pytest.raises(ValueError, match=r"recipe\.json: unknown key 'bits': expected keys are"):
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


def test_checkpoint_is_frozen(model):
    checkpoint = load_checkpoint(model)
    assert isinstance(checkpoint, Checkpoint)
    with pytest.raises(dataclasses.FrozenInstanceError):
        checkpoint.path = model
