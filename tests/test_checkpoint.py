# SPDX-License-Identifier: Apache-2.0
"""Reading model folders: roles and shapes, laziness, and how files and folders can lie."""

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
from conftest import DTYPES, edit_config, write_json, write_weights
from memory import anonymous_bytes
from safetensors.numpy import load_file

import singlequant as sq
from singlequant._C import FormatError
from singlequant.checkpoint.folder import Checkpoint, load_checkpoint
from singlequant.config import QuantConfig
from singlequant.models.families import FAMILIES
from singlequant.models.parts import Stored

MakeCheckpoint = Callable[..., Path]
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q0 = "model.layers.0.self_attn.q_proj.weight"


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


@pytest.mark.parametrize("change", ["one value", "all values", "type"])
def test_head_beside_a_flag_that_ties_it_is_read_as_it_is(model, tmp_path, text, change):
    tensors = load_file(model / FILE)
    head = tensors["model.embed_tokens.weight"].copy()
    if change == "one value":
        head[len(head) // 4, 5] += 1  # in none of the pages that are compared first
    else:
        head = head.astype(np.float32) if change == "type" else head * 2
    write_weights(model, {**tensors, "lm_head.weight": head}, 1)
    with pytest.warns(UserWarning, match=r"tie_word_embeddings is true .* but lm_head\.weight is"):
        found = load_checkpoint(model)
    assert not found.spec.tied
    np.testing.assert_array_equal(found.head, head)
    out = tmp_path / "out"
    sq.quantize_folder(found, out, sq.QuantConfig(calibration_tokens=64, head_bits=16), text)
    packed = load_checkpoint(out)
    np.testing.assert_array_equal(packed.head, head)
    assert packed.config["tie_word_embeddings"] is False


def test_head_of_another_size_beside_a_flag_that_ties_it_is_refused(model):
    tensors = load_file(model / FILE)
    head = tensors["model.embed_tokens.weight"][:-1].copy()
    write_weights(model, {**tensors, "lm_head.weight": head}, 1)
    with (
        pytest.warns(UserWarning, match="tie_word_embeddings"),
        pytest.raises(FormatError, match=r"lm_head\.weight: expected shape"),
    ):
        load_checkpoint(model)


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


def test_checkpoint_is_frozen(model):
    checkpoint = load_checkpoint(model)
    assert isinstance(checkpoint, Checkpoint)
    with pytest.raises(dataclasses.FrozenInstanceError):
        checkpoint.path = model


FUSED = dataclasses.replace(
    FAMILIES["LlamaForCausalLM"],
    fused=(Stored("model.layers.{i}.self_attn.qkv_proj.weight", ("q", "k", "v")),
           Stored("model.layers.{i}.mlp.gate_up_proj.weight", ("gate", "up"))),
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


def test_reference_model_is_read(reference_model):
    checkpoint = load_checkpoint(reference_model)
    assert (checkpoint.spec.layers, checkpoint.spec.hidden, checkpoint.dtype) == (
        8,
        512,
        "float16",
    )
    assert checkpoint.spec.parameters == 25_698_816
    assert checkpoint.tokenizer.get_vocab_size() == checkpoint.spec.vocab


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
