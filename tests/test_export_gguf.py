# SPDX-License-Identifier: Apache-2.0
"""`export --to gguf` and `gguf-blocks`: read back by the gguf package, by our reader, by llama.cpp.

What needs llama-cpp-python is skipped without it: its build takes long.
"""

import json
import os
from pathlib import Path

import family_models as zoo
import ml_dtypes
import numpy as np
import pytest
from conftest import SENTENCES, copy_golden, edit_config, make_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers

import singlequant as sq
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.checkpoint.unpacked import UnpackedCheckpoint
from singlequant.export.gguf import BLOCKS
from singlequant.export.gguf_tokens import split_name
from singlequant.methods.registry import METHODS
from singlequant.weights import PackedLinear, PackedTable

gguf = pytest.importorskip("gguf")

FILES = Path(__file__).parent / "data" / "gguf"
FAMILIES = Path(__file__).parent / "data" / "families"
TOLERANCE = 1e-5  # absolute, of logits of order 1 in float32: frequencies are factors in float32
LLAMA_CPP = 2e-3  # the same, with keys and values in float32; its gelu is a table of float16
# Golden folders that GGUF can say, and changes to config.json that make it so.
WRITTEN = {"llama-tied": {}, "llama-llama3": {}, "qwen2-tied": {}, "qwen3-tied": {},
           "gemma-tied": {}, "gemma2-tied": {"query_pre_attn_scalar": 12},
           "gemma3-tied": {"query_pre_attn_scalar": 12,
                           "layer_types": ["sliding_attention"] * 2},
           "phi3-longrope": {},
           "granite-factors": {}, "cohere-command-r": {}, "mixtral-tied": {}}
REFUSED = {
    "mistral-window": "sliding_window: expected none, as llama.cpp's llama attends to all tokens, "
                      "found 16 of 128",
    "gemma2-tied": r"with layer 0: attention\.scale = 0\.288675, found 0\.204124",
    "smollm3-no-rope": "with layer 1: rotary embedding = ",
    "qwen3-moe-tied": "with layer 0: ",
    "cohere-qk-norm": "llama.cpp's command-r has such norms from 64 layers on, found 2 layers",
    "qwen2-moe-shared": "tie_word_embeddings: expected false, as llama.cpp's qwen2moe has a head",
    "gpt2-tied": "expected a family that GGUF files are written of: .* found GPT2LMHeadModel",
}
PLAIN_METHODS = ["none", "smoothquant"]  # that rotate nothing and need no torch


def logits(path, tokens):
    return sq.load(path, kv_bits=32).forward(tokens)


def fields(path):
    """The metadata of a file by the package's own reader."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def values(path):
    """All tensors of a file in float32 by the package's own reader and dequantizer."""
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf.GGUFReader(path).tensors}


def quantized(folder, out, **options):
    text = out.with_name("text.txt")
    text.write_text(SENTENCES[:600])
    config = sq.QuantConfig(**{"scheme": "w4a16", "method": "none", "weights": "rtn", "bits": 4,
                               "calibration_tokens": 128, **options})
    return sq.quantize_folder(folder, out, config, text).out


# ---- 16 bits ------------------------------------------------------------------------------------


@pytest.fixture
def golden(request, tmp_path):
    folder = copy_golden(request.param, tmp_path)
    edit_config(folder, **WRITTEN[request.param])
    return folder


@pytest.mark.parametrize("golden", WRITTEN, indirect=True)
def test_written_family_is_read_back(golden, tmp_path):
    out = sq.export(golden, "gguf", tmp_path / "out", dtype="float32")
    tokens = np.load(golden / "tokens.npy")[None]
    np.testing.assert_allclose(logits(out / "model.gguf", tokens), logits(golden, tokens),
                               atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_model_that_gguf_cannot_say_is_refused_by_what_differs(name, tmp_path):
    with pytest.raises(ValueError, match=REFUSED[name]):
        sq.export(FAMILIES / name, "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_every_other_golden_family_is_written_or_refused(tmp_path):
    names = {f"{name}-{variant}" for name, variant in zoo.variants(golden=True)}
    for name in sorted(names - {*WRITTEN} - {*REFUSED}):
        with pytest.raises(ValueError, match="expected a family that GGUF|attends to all tokens"):
            sq.export(FAMILIES / name, "gguf", tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "mixtral"])
def test_file_of_llama_cpps_converter_is_written_again(name, tmp_path):
    """The same tensors under the same names, in the same order of rows."""
    out = sq.export(FILES / f"{name}.gguf", "gguf", tmp_path / "out", dtype="float32")
    theirs, own = values(FILES / f"{name}.gguf"), values(out / "model.gguf")
    assert own.keys() == theirs.keys()
    for key, expected in theirs.items():
        np.testing.assert_allclose(own[key], expected, atol=1e-6, rtol=1e-6, err_msg=key)
    before, after = fields(FILES / f"{name}.gguf"), fields(out / "model.gguf")
    architecture = before["general.architecture"]
    numbers = [key for key in before if key.startswith(f"{architecture}.")]
    assert {key: after[key] for key in numbers if key in after} == pytest.approx(
        {key: before[key] for key in numbers if key in after})
    assert f"{architecture}.attention.head_count_kv" in {*numbers} & {*after}


@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
])
def test_scaled_rotary_embedding_is_read_back(scaling, tmp_path):
    folder = make_checkpoint(tmp_path / "folder", rope_scaling=scaling, bias=True, tie=False)
    out = sq.export(folder, "gguf", tmp_path / "out", dtype="float32")
    tokens = zoo.random_tokens(100)[None]
    np.testing.assert_allclose(logits(out / "model.gguf", tokens), logits(folder, tokens),
                               atol=TOLERANCE, rtol=0)


def test_epsilon_of_float32_is_the_same(model, tmp_path):
    """transformers writes 1e-5 as float32 has it into the config.json of SmolLM2."""
    edit_config(model, rms_norm_eps=9.999999747378752e-06)
    path = sq.export(model, "gguf", tmp_path / "out") / "model.gguf"
    assert fields(path)["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)


def test_yarn_with_factors_that_gguf_has_not_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "folder", rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0,
        "original_max_position_embeddings": 64})
    with pytest.raises(ValueError, match="attention_factor: expected none, as GGUF's yarn"):
        sq.export(folder, "gguf", tmp_path / "out")


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16"),
                                             ("float32", "F32")])
def test_matrices_have_the_type_and_vectors_float32(dtype, kind, model, tmp_path):
    path = sq.export(model, "gguf", tmp_path / "out", dtype=dtype) / "model.gguf"
    kinds = {len(t.shape): set() for t in gguf.GGUFReader(path).tensors}
    for tensor in gguf.GGUFReader(path).tensors:
        kinds[len(tensor.shape)].add(tensor.tensor_type.name)
    assert kinds == {1: {"F32"}, 2: {kind}}
    source, name = load_checkpoint(model), "model.layers.1.mlp.up_proj.weight"
    numpy_type = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    expected = source.tensor(name).astype(numpy_type).astype(np.float32)
    np.testing.assert_array_equal(values(path)["blk.1.ffn_up.weight"], expected)


def test_rotated_packed_folder_is_turned_back(model, tmp_path):
    packed = quantized(model, tmp_path / "packed", method="balanced", head_bits=16,
                       embedding_bits=16)
    out = sq.export(packed, "gguf", tmp_path / "out", dtype="float32")
    tokens = zoo.random_tokens(40)[None]
    np.testing.assert_allclose(logits(out / "model.gguf", tokens), logits(packed, tokens),
                               atol=1e-4, rtol=0)


# ---- blocks -------------------------------------------------------------------------------------


def in_blocks(weight):
    """What 32 codes and a float16 scale stand for."""
    if isinstance(weight, PackedTable):
        return weight.gather(np.arange(weight.shape[0]))
    codes = sq._C.unpack(weight.words, weight.shape[1], weight.bits).astype(np.float32)
    scales = weight.scales.astype(np.float16).astype(np.float32)
    return codes * np.repeat(scales, weight.shape[1] // scales.shape[1], axis=1)


@pytest.mark.parametrize(("bits", "group"), [(4, 0), (4, 32), (5, 0), (6, 32), (8, 0)])
@pytest.mark.parametrize("method", PLAIN_METHODS)
def test_blocks_are_the_codes(method, bits, group, model, tmp_path):
    packed = quantized(model, tmp_path / "packed", method=method, bits=bits, group_size=group,
                       head_bits=4 if bits == 4 else 6, embedding_bits=4 if bits == 4 else 6)
    out = sq.export(packed, "gguf-blocks", tmp_path / "out")
    found, source = values(out / "model.gguf"), load_checkpoint(packed)
    names = {"o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
             "v": "attn_v"}
    for i in range(2):
        for role, name in names.items():
            weight = source.layer(i).linears[role].weight
            assert weight.bits == bits
            np.testing.assert_array_equal(found[f"blk.{i}.{name}.weight"], in_blocks(weight))
    np.testing.assert_array_equal(found["token_embd.weight"], in_blocks(source.embedding))
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(out / "model.gguf").tensors}
    assert kinds == {"F32", BLOCKS[bits][0], BLOCKS[source.embedding.bits][0]}


def test_queries_are_reordered_in_blocks_as_in_floats(model, tmp_path):
    packed = quantized(model, tmp_path / "packed")
    blocks = values(sq.export(packed, "gguf-blocks", tmp_path / "a") / "model.gguf")
    floats = values(sq.export(packed, "gguf", tmp_path / "b", dtype="float32") / "model.gguf")
    for name in ("blk.0.attn_q.weight", "blk.1.attn_k.weight"):
        np.testing.assert_allclose(blocks[name], floats[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["phi3-longrope", "mixtral-tied"])
def test_fused_and_stacked_linears_are_kept_in_blocks(name, tmp_path):
    folder = make_wide(name, tmp_path)
    packed = quantized(folder, tmp_path / "packed", head_bits=8)
    path = sq.export(packed, "gguf-blocks", tmp_path / "out", dtype="float32") / "model.gguf"
    view, read = UnpackedCheckpoint(load_checkpoint(packed)), load_checkpoint(path)
    for role, linear in view.layer(1).linears.items():
        np.testing.assert_allclose(read.layer(1).linears[role].weight, linear.weight, rtol=2e-3,
                                   atol=1e-6, err_msg=role)
    kinds = {t.name.split(".")[2]: t.tensor_type.name for t in gguf.GGUFReader(path).tensors
             if t.name.startswith("blk")}
    assert {kinds[key] for key in kinds if key in (
        "attn_qkv", "attn_q", "ffn_up", "ffn_down_exps", "ffn_up_exps")} == {"Q4_0"}
    assert kinds.get("ffn_gate_inp", "F32") == "F32"


def make_wide(name, tmp_path):
    """A golden folder whose rows are repeated, so that their length is a multiple of 32."""
    folder = copy_golden(name, tmp_path)
    source = load_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    width = config["intermediate_size"]
    edit_config(folder, intermediate_size=32 * -(-width // 32))
    from safetensors.numpy import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    for key, array in tensors.items():
        for axis, size in enumerate(array.shape):
            if size % width == 0 and size != source.spec.hidden:
                blocks = np.split(array, size // width, axis)
                wide = [np.take(b, np.arange(32 * -(-width // 32)) % width, axis) for b in blocks]
                array = np.concatenate(wide, axis)
        tensors[key] = np.ascontiguousarray(array)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("method", [m.name for m in METHODS.values()
                                    if not m.extra and m.name not in PLAIN_METHODS])
def test_codes_of_rotated_inputs_are_refused_by_the_site(method, model, tmp_path):
    packed = quantized(model, tmp_path / "packed", method=method)
    with pytest.raises(ValueError, match=r"found a rotation that runs beside them \(model\.layers"
                       r"\.0\.rotations\.\w+\): quantize with --method smoothquant or "
                       r"efficientqat or none"):
        sq.export(packed, "gguf-blocks", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mixed_bits_and_dense_linears_have_types_of_their_own(model, tmp_path):
    packed = quantized(model, tmp_path / "packed", bits=5.5, scheme="w4a8",
                       ignore=("*.1.mlp.down_proj",))
    path = sq.export(packed, "gguf-blocks", tmp_path / "out", dtype="float16") / "model.gguf"
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.1.ffn_down.weight"] == "F16"
    bits = {BLOCKS[linear.weight.bits][0] for i in range(2)
            for linear in load_checkpoint(packed).layer(i).linears.values()
            if isinstance(linear.weight, PackedLinear)}
    assert len(bits) > 1
    assert {kinds[f"blk.0.{name}.weight"] for name in ("attn_q", "ffn_up", "attn_v", "ffn_down",
                                                       "ffn_gate", "attn_output")} <= bits


@pytest.mark.parametrize(("what", "message"), [
    ("unquantized", "gguf-blocks: expected a packed folder, whose codes it keeps, found an unqu"),
    ("narrow", "down_proj.weight: expected rows of whole blocks of 32 for Q4_0, found 88 values"),
    ("large", r"up_proj\.weight: expected scales up to 65504, as blocks have them in float16"),
])
def test_what_blocks_cannot_hold_is_refused_and_nothing_is_left(what, message, tmp_path):
    folder = make_checkpoint(tmp_path / "model", dtype="float32",
                             intermediate=88 if what == "narrow" else 96)
    if what == "large":
        from safetensors.numpy import load_file, save_file
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e7
        save_file(tensors, folder / "model.safetensors")
    source = folder if what == "unquantized" else quantized(folder, tmp_path / "packed")
    with pytest.raises(ValueError, match=message):
        sq.export(source, "gguf-blocks", tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


# ---- the folder ---------------------------------------------------------------------------------


def test_folder_opens_with_its_tokenizer_and_equal_inputs_give_equal_bytes(model, tmp_path):
    first, second = (sq.export(model, "gguf", tmp_path / name / "out") for name in "ab")
    assert {*os.listdir(first)} == {"model.gguf", "tokenizer.json", "tokenizer_config.json",
                                    "generation_config.json"}
    assert (first / "model.gguf").read_bytes() == (second / "model.gguf").read_bytes()
    opened, source = load_checkpoint(first / "model.gguf"), load_checkpoint(model)
    np.testing.assert_array_equal(opened.encode("the fox"), source.encode("the fox"))


def test_cancelling_leaves_nothing(model, tmp_path):
    def cancel(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        sq.export(model, "gguf", tmp_path / "out", progress=cancel)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_without_the_package_the_error_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'singlequant\[gguf\]'"):
        sq.export(model, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizer_and_chat_template_are_in_the_file(model, tmp_path):
    (model / "chat_template.jinja").write_text("{{ messages }}")
    found = fields(sq.export(model, "gguf", tmp_path / "out") / "model.gguf")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    assert [found["tokenizer.ggml.tokens"][number] for number in vocab.values()] == [*vocab]
    assert len(found["tokenizer.ggml.tokens"]) == 320
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in
                                              tokenizer["model"]["merges"]]
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.bos_token_id"] == 0
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    kinds = gguf.TokenType
    assert found["tokenizer.ggml.token_type"][:3] == [kinds.CONTROL, kinds.CONTROL, kinds.NORMAL]
    unused = [kind == kinds.UNUSED for kind in found["tokenizer.ggml.token_type"]]
    assert unused == [number not in vocab.values() for number in range(320)]


@pytest.mark.parametrize(("steps", "name"), [
    ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
    ([pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
    ([pre_tokenizers.Whitespace()], None),
    ([pre_tokenizers.ByteLevel(add_prefix_space=True)], None),
])
def test_way_to_split_texts_has_llama_cpps_name_or_none(steps, name):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    assert split_name(json.loads(tokenizer.to_str())) == name


def test_other_tokenizer_is_left_out(model, tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    tokenizer.save(str(model / "tokenizer.json"))
    found = fields(sq.export(model, "gguf", tmp_path / "out") / "model.gguf")
    assert found["tokenizer.ggml.model"] == "none"
    assert "tokenizer.ggml.tokens" not in found


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": {"type": "BPE"}}', "\udcff"])
def test_broken_tokenizer_is_named_and_nothing_is_left(text, model, tmp_path):
    (model / "tokenizer.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(sq.FormatError, match="tokenizer.json: "):
        sq.export(model, "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- a plain folder of a file -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "mixtral"])
def test_plain_folder_of_a_file_has_its_logits(name, tmp_path):
    out = sq.export(FILES / f"{name}.gguf", "hf", tmp_path / "out", dtype="float32")
    tokens = np.arange(24)[None] * 7 % 90 + 3
    np.testing.assert_allclose(logits(out, tokens), logits(FILES / f"{name}.gguf", tokens),
                               atol=TOLERANCE, rtol=0)


def test_plain_folder_of_a_packed_folder_of_a_file(model, tmp_path):
    file = sq.export(model, "gguf", tmp_path / "file") / "model.gguf"
    packed = quantized(file, tmp_path / "packed", head_bits=16, embedding_bits=16)
    out = sq.export(packed, "hf", tmp_path / "out", dtype="float32")
    tokens = zoo.random_tokens(24)[None]
    np.testing.assert_allclose(logits(out, tokens), logits(packed, tokens), atol=1e-4, rtol=0)
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"


# ---- llama.cpp ----------------------------------------------------------------------------------


def llama_cpp(path, vocab_only=False):
    package = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    return package.Llama(str(path), n_ctx=128, n_batch=128, n_threads=1, logits_all=True,
                         type_k=package.GGML_TYPE_F32, type_v=package.GGML_TYPE_F32,
                         vocab_only=vocab_only, verbose=False)


def llama_cpp_logits(path, tokens):
    model = llama_cpp(path)
    model.eval(tokens.reshape(-1).tolist())
    return model.scores[: tokens.size].copy()


@pytest.mark.parametrize("golden", WRITTEN, indirect=True)
def test_llama_cpp_gives_the_logits_of_a_written_family(golden, tmp_path):
    (golden / "tokenizer.json").unlink()  # llama.cpp looks for Phi-3's own tokens in it
    out = sq.export(golden, "gguf", tmp_path / "out", dtype="float32")
    tokens = np.load(golden / "tokens.npy")
    np.testing.assert_allclose(llama_cpp_logits(out / "model.gguf", tokens),
                               logits(golden, tokens[None])[0], atol=LLAMA_CPP, rtol=0)


def test_llama_cpp_runs_the_blocks(model, tmp_path):
    """It rounds activations to 8 bits."""
    packed = quantized(model, tmp_path / "packed", head_bits=8)
    tokens = zoo.random_tokens(40)
    found = llama_cpp_logits(sq.export(packed, "gguf-blocks", tmp_path / "out") / "model.gguf",
                             tokens)
    expected = logits(packed, tokens[None])[0]
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_llama_cpp_splits_a_text_as_the_tokenizer_does(model, tmp_path):
    out = sq.export(model, "gguf", tmp_path / "out")
    text = "The quick brown fox's 123 rotations,  and\n\n more: it's preserved."
    found = llama_cpp(out / "model.gguf", True).tokenize(text.encode(), add_bos=True)
    assert found == load_checkpoint(model).encode(text).tolist()
