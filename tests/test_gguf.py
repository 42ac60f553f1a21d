# SPDX-License-Identifier: Apache-2.0
"""GGUF files: llama.cpp's own, some made by hand, and some that lie."""

import json
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import make_checkpoint, write_tokenizer

import singlequant as sq
from singlequant import FormatError, load_checkpoint
from singlequant.cli.main import main
from singlequant.models.gguf_config import KEYS, ROWS

gguf = pytest.importorskip("gguf")

GOLDEN = Path(__file__).parent / "data" / "gguf"
TOKENS = np.arange(24)[None] * 7 % 90 + 3
TYPES = gguf.GGMLQuantizationType


# ---- files of llama.cpp's converter -------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "mixtral"])
def test_file_of_llama_cpp_equals_transformers(name):
    logits = sq.load(GOLDEN / f"{name}.gguf").forward(TOKENS)
    np.testing.assert_allclose(logits, np.load(GOLDEN / f"{name}.npy"), atol=1e-4, rtol=0)


def test_experts_of_llama_cpp_are_read_one_by_one():
    checkpoint = load_checkpoint(GOLDEN / "mixtral.gguf")
    assert checkpoint.spec.family == "MixtralForCausalLM"
    names = [name for name in checkpoint.tensors if ".experts." in name]
    assert len(names) == 2 * 3 * 3  # layers, experts, linears
    assert all(checkpoint.tensor(name).shape == (32, 32) for name in names)
    assert len({checkpoint.tensor(name).tobytes() for name in names}) == len(names)


# ---- files made by hand -------------------------------------------------------------------------


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter orders them."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder: Path, path: Path, name: str, kind=TYPES.F16, change=None,
               remove: tuple[str, ...] = (), **meta) -> Path:
    """Writes a folder of LLaMA's names as GGUF. change(name, array) -> array or None, meta: keys
    of the architecture in place of those that config.json gives."""
    checkpoint, row = load_checkpoint(folder), ROWS[name]
    config, writer = checkpoint.config, gguf.GGUFWriter(path, name)
    values = {there: config[key] for there, key in (KEYS | row.keys).items()
              if config.get(key) is not None and type(config[key]) in (int, float)}
    for key, value in {**values, **meta}.items():
        if value is None:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array, bool: writer.add_bool}[type(value)]
        add(key if "." in key and key.split(".")[0] in ("general", "split", "tokenizer")
            else f"{name}.{key}", value)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    number = next(n for n, label in gguf.MODEL_ARCH_NAMES.items() if label == name)
    names = gguf.get_tensor_name_map(number, checkpoint.spec.layers)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for tensor in checkpoint.tensors:
        array, (stem, _, part) = checkpoint.tensor(tensor), tensor.rpartition(".")
        array = change(tensor, array) if change else array
        if array is None or tensor in remove:
            continue
        if row.permuted and stem.rpartition(".")[2] in heads:
            array = permute(array, heads[stem.rpartition(".")[2]])
        if stem.endswith("norm"):
            array = array.astype(np.float32) + np.float32(row.offset)
        found = names.get_name(stem) or stem
        if array.ndim < 2 or kind is None:
            writer.add_tensor(f"{found}.{part}", array.astype(np.float32))
        else:
            data = gguf.quants.quantize(array.astype(np.float32), kind)
            writer.add_tensor(f"{found}.{part}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "folder", tie=False, vocab=320)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [TYPES.F16, TYPES.F32, TYPES.BF16])
def test_plain_types_are_the_folders_tensors(tmp_path, kind, bias):
    folder = make_checkpoint(tmp_path / "folder", tie=False, bias=bias)
    plain = load_checkpoint(folder)
    found = load_checkpoint(write_gguf(folder, tmp_path / "m.gguf", "llama", kind))
    assert set(found.tensors) == set(plain.tensors)
    assert found.spec == plain.spec
    assert found.config["eos_token_id"] == 1
    for name in plain.tensors:
        expected = plain.tensor(name).astype(np.float32)
        if kind == TYPES.BF16 and expected.ndim == 2:
            expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
        tensor = found.tensor(name)
        assert not tensor.flags.writeable
        assert found.tensors[name].shape == tensor.shape
        assert found.tensors[name].nbytes == tensor.nbytes
        np.testing.assert_array_equal(tensor.astype(np.float32), expected, err_msg=name)


@pytest.mark.parametrize("kind", [TYPES.Q8_0, TYPES.Q4_0, TYPES.Q5_1])
def test_quantized_types_become_float16(folder, tmp_path, kind):
    plain = load_checkpoint(folder)
    found = load_checkpoint(write_gguf(folder, tmp_path / "m.gguf", "llama", kind))
    for name in plain.tensors:
        tensor = plain.tensor(name).astype(np.float32)
        if tensor.ndim == 2:
            blocks = gguf.quants.quantize(tensor, kind)
            tensor = gguf.quants.dequantize(blocks, kind).astype(np.float16)
            assert found.tensors[name].dtype == "F16"
        np.testing.assert_array_equal(found.tensor(name), tensor, err_msg=name)
    assert found.dtype == "float16"


def test_large_tensors_are_dequantized_some_rows_at_a_time(folder, tmp_path, monkeypatch):
    path = write_gguf(folder, tmp_path / "m.gguf", "llama", TYPES.Q8_0)
    whole = load_checkpoint(path)
    expected = {name: whole.tensor(name) for name in whole.tensors}
    monkeypatch.setattr("singlequant.checkpoint.gguf_file.VALUES_AT_A_TIME", 200)
    parts = load_checkpoint(path)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(parts.tensor(name), tensor)


def test_tied_head_and_a_family_without_reordering(tmp_path):
    folder = make_checkpoint(tmp_path / "folder", architecture="Qwen2ForCausalLM")
    found = load_checkpoint(write_gguf(folder, tmp_path / "m.gguf", "qwen2"))
    plain = load_checkpoint(folder)
    assert found.spec.tied
    assert found.spec == plain.spec
    for name in plain.tensors:
        np.testing.assert_array_equal(found.tensor(name), plain.tensor(name))


def test_window_makes_it_mistral(folder, tmp_path):
    path = write_gguf(folder, tmp_path / "m.gguf", "llama", **{"attention.sliding_window": 16})
    spec = load_checkpoint(path).spec
    assert spec.family == "MistralForCausalLM"
    assert spec.attention.window == 16
    path = write_gguf(folder, tmp_path / "n.gguf", "llama", **{"attention.sliding_window": 0})
    assert load_checkpoint(path).spec.family == "LlamaForCausalLM"


@pytest.mark.parametrize(("scaling", "meta"), [
    ({"rope_type": "linear", "factor": 4.0},
     {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    ({"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
     {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
      "rope.scaling.original_context_length": 64}),
])
def test_rotary_scaling_of_metadata(tmp_path, scaling, meta):
    folder = make_checkpoint(tmp_path / "folder", rope_scaling=scaling)
    found = load_checkpoint(write_gguf(folder, tmp_path / "m.gguf", "llama", **meta))
    assert found.spec.attention.rotary == load_checkpoint(folder).spec.attention.rotary


def test_packed_folder_of_a_file_is_that_of_the_folder(folder, tmp_path, monkeypatch, capsys, text):
    place = tmp_path / "place"
    place.mkdir()
    write_gguf(folder, place / "m.gguf", "llama")
    shutil.copy(folder / "tokenizer.json", place)
    monkeypatch.chdir(place)
    assert main(["quantize", "m.gguf", "OUT", "--calibration-tokens", "64"]) == 0
    assert main(["generate", "m.gguf", "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert main(["eval", "m.gguf", "--text", str(text), "--seq-len", "32"]) == 0
    capsys.readouterr()
    assert "m.gguf" in repr(load_checkpoint("m.gguf"))
    expected = sq.quantize_folder(folder, tmp_path / "out",
                                  sq.QuantConfig(calibration_tokens=64)).out
    logits = [sq.load(path).forward(np.arange(9)[None]) for path in ("OUT", expected)]
    np.testing.assert_array_equal(*logits)
    config = json.loads(Path("OUT/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_tokenizer_is_read_beside_the_file(folder, tmp_path):
    path = write_gguf(folder, tmp_path / "m.gguf", "llama")
    with pytest.raises(FormatError, match=r"no such file; put tokenizer\.json .* m\.gguf was made"):
        load_checkpoint(path).encode("a")
    write_tokenizer(tmp_path, 320)
    assert load_checkpoint(path).encode("a").size


# ---- files that lie -----------------------------------------------------------------------------


@pytest.mark.parametrize(("meta", "message"), [
    ({"split.count": 3}, r"split\.count: expected a whole model, found one of 3 files"),
    ({"attention.causal": 3}, r"llama\.attention\.causal: expected no such key, .* found 3"),
    ({"attention.value_length": 8, "attention.key_length": 16},
     r"value_length: expected attention\.key_length = 16, found 8"),
    ({"rope.scaling.type": "su"}, "rope.scaling.type: expected none, linear, yarn"),
    ({"block_count": 99}, "block_count: expected at most 21, the number of tensors, found 99"),
    ({"block_count": 1}, r"blk\.1\.attn_k\.weight: unexpected tensor"),
    ({"block_count": 3}, r"layers\.2\..*: missing tensor"),
    ({"attention.head_count": None}, "num_attention_heads: expected an integer"),
    ({"embedding_length": 32}, r"expected shape \[320, 32\], found \[320, 64\]"),
    ({"general.alignment": 3}, "general.alignment: expected a power of two, found 3"),
])
def test_metadata_that_lie_are_refused(folder, tmp_path, meta, message):
    path = write_gguf(folder, tmp_path / "m.gguf", "llama", **meta)
    with pytest.raises(FormatError, match=message):
        load_checkpoint(path)


def test_zero_of_an_unknown_key_is_no_matter(folder, tmp_path):
    path = write_gguf(folder, tmp_path / "m.gguf", "llama", **{"attention.causal": 0})
    assert load_checkpoint(path).spec.layers == 2


def test_unknown_architecture_is_refused_by_name(folder, tmp_path):
    raw = write_gguf(folder, tmp_path / "m.gguf", "llama").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw.replace(b"llama", b"mamba"))
    with pytest.raises(FormatError, match="architecture: expected one of llama, .* found 'mamba'"):
        load_checkpoint(tmp_path / "m.gguf")


def test_tensors_too_many_and_too_few_are_named(folder, tmp_path):
    up = "model.layers.1.mlp.up_proj.weight"
    path = write_gguf(folder, tmp_path / "m.gguf", "llama", remove=(up,))
    with pytest.raises(FormatError, match=f"{up}: missing tensor"):
        load_checkpoint(path)
    path = write_gguf(folder, tmp_path / "n.gguf", "llama",
                      change=lambda name, array: array[:32] if name == up else array)
    with pytest.raises(FormatError, match=rf"{up}: expected shape \[96, 64\], found \[32, 64\]"):
        load_checkpoint(path)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "found an empty one"), (b"GGU", "expected a folder or a GGUF file"),
    (b"PK\x03\x04" + bytes(40), "expected a folder or a GGUF file, found b'PK"),
    (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version: expected 2 or 3, found 1"),
    (b"GGUF" + struct.pack("<I", 3 << 24) + bytes(40), "version: expected 2 or 3"),
    (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "truncated: 9223372036854775808 entries"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "truncated: 1099511627776 entries"),
])
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        load_checkpoint(tmp_path / "m.gguf")


def test_truncated_anywhere_is_refused(tmp_path):
    raw = (GOLDEN / "llama.gguf").read_bytes()
    for size in (*range(4, 4000, 61), len(raw) // 2, len(raw) - 1):
        (tmp_path / "m.gguf").write_bytes(raw[:size])
        with pytest.raises(FormatError):
            load_checkpoint(tmp_path / "m.gguf")


def test_flipped_bits_of_the_header_are_read_or_refused(tmp_path):
    """Nothing but a FormatError or a NaN: no other exception, no endless loop, no huge array."""
    raw, rng = (GOLDEN / "phi3.gguf").read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(raw)
        data[rng.integers(4, 3500)] ^= 1 << rng.integers(0, 8)
        (tmp_path / "m.gguf").write_bytes(data)
        try:
            load_checkpoint(tmp_path / "m.gguf")
        except FormatError:
            refused += 1
    assert refused > 100


def test_type_that_the_package_does_not_dequantize_is_refused(folder, tmp_path, monkeypatch):
    path = write_gguf(folder, tmp_path / "m.gguf", "llama", TYPES.Q8_0)

    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    with pytest.raises(FormatError, match="expected a type that the gguf package .* found Q8_0"):
        load_checkpoint(path)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'singlequant\[gguf\]'"):
        load_checkpoint(GOLDEN / "llama.gguf")
