# SPDX-License-Identifier: Apache-2.0
"""`export`: plain folders that compute what the packed ones do, under the family's own names."""

import json
import os
import re
from pathlib import Path

import family_models as zoo
import ml_dtypes
import numpy as np
import pytest
from conftest import SENTENCES, copy_golden, write_json
from safetensors.numpy import load_file, save_file

import singlequant as sq
from singlequant import _C
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.checkpoint.unpacked import UnpackedCheckpoint
from singlequant.cli.main import main
from singlequant.export import hf
from singlequant.export.formats import FORMATS
from singlequant.methods.registry import METHODS
from singlequant.rotations import Factor
from singlequant.rows import TurnBack
from singlequant.tensors import read_header

FAMILIES = Path(__file__).resolve().parent / "data" / "families"
GOLDEN = [f"{name}-{variant}" for name, variant in zoo.variants(golden=True)]
TOLERANCE = 1e-4  # absolute, of logits of order 1 in float32
WHOLE_TABLES = {"head_bits": 16, "embedding_bits": 16}  # a head of codes rounds what it multiplies
CONFIG = sq.QuantConfig("w4a16", weights="rtn", bits=4, calibration_tokens=128, **WHOLE_TABLES)


def quantized(folder, out, config=CONFIG):
    """A packed folder, calibrated on a short text."""
    text = out.with_name("text.txt")
    text.write_text(SENTENCES[:600])
    return sq.quantize_folder(folder, out, config, text).out


def logits(folder, tokens):
    """Those of a folder with keys and values in 32 bits, as an unquantized one has them."""
    return sq.load(folder, kv_bits=32).forward(tokens)


def tensors(folder):
    """Type and shape of what a folder stores, by name."""
    return {name: (info.dtype, info.shape) for path in sorted(folder.glob("*.safetensors"))
            for name, info in read_header(path).items()}


def failing(capsys, *arguments):
    """The line that the command prints when it fails."""
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---- turning back -------------------------------------------------------------------------------


def orthogonal(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32)


def chain(rng, n):
    pairs = np.stack([np.arange(n), (np.arange(n) + rng.integers(1, n, n)) % n], axis=1)
    return Factor(n, True, pairs.astype(np.int32), rng.uniform(-3, 3, n)).runtime()


def blocks(rng, count, b):
    return np.stack([orthogonal(rng, b) for _ in range(count)])


def invertible(rng, count, b):
    return (rng.standard_normal((count, b, b)) + 3 * np.eye(b)).astype(np.float32)


ROTATIONS = {
    "both-factors": lambda r: _C.Rotation(96, orthogonal(r, 12), orthogonal(r, 8)),
    "left-factor": lambda r: _C.Rotation(96, orthogonal(r, 12)),
    "right-factor": lambda r: _C.Rotation(96, None, orthogonal(r, 8)),
    "blocks-of-alignment": lambda r: _C.Rotation(96, align=invertible(r, 12, 8)),
    "aligned": lambda r: _C.Rotation(96, orthogonal(r, 12), None, invertible(r, 12, 8)),
    "block-rotation": lambda r: _C.Rotation.blocks(
        blocks(r, 12, 8), r.permutation(96).astype(np.int32), blocks(r, 12, 8)),
    "chain-first": lambda r: _C.Rotation(1040, chain(r, 520), orthogonal(r, 2)),
    "chain-second": lambda r: _C.Rotation(1042, orthogonal(r, 2), chain(r, 521)),
    "chain-alone": lambda r: _C.Rotation(1009, chain(r, 1009)),
    "nothing": lambda r: _C.Rotation(96),
}  # fmt: skip


@pytest.mark.parametrize("name", ROTATIONS)
def test_turned_back_rows_give_the_product_of_turned_ones(name):
    rng = np.random.default_rng(3)
    rotation = ROTATIONS[name](rng)
    matrix = _C.rotate(np.eye(rotation.k, dtype=np.float32), rotation)  # x' = x matrix
    rows = rng.standard_normal((5, rotation.k)).astype(np.float32)
    np.testing.assert_allclose(TurnBack(rotation)(rows), rows @ matrix.T, atol=2e-5, rtol=0)


# ---- families and methods -----------------------------------------------------------------------


@pytest.fixture
def golden(request, tmp_path):
    """A family's folder with a tokenizer."""
    return copy_golden(request.param, tmp_path)


@pytest.mark.parametrize("golden", GOLDEN, indirect=True)
def test_family_is_written_under_its_names_and_computes_what_the_packed_folder_does(
    golden, tmp_path
):
    packed = quantized(golden, tmp_path / "packed")
    plain = sq.export(packed, "hf", tmp_path / "plain", dtype="float32")
    assert ({name: shape for name, (_, shape) in tensors(plain).items()}
            == {name: shape for name, (_, shape) in tensors(golden).items()})
    assert {dtype for dtype, _ in tensors(plain).values()} == {"F32"}
    tokens = np.load(golden / "tokens.npy")[None]
    np.testing.assert_allclose(logits(plain, tokens), logits(packed, tokens), atol=TOLERANCE,
                               rtol=0)


@pytest.mark.parametrize("golden", GOLDEN, indirect=True)
def test_unquantized_family_is_written_as_it_is(golden, tmp_path):
    """Under the same names in whatever form it was stored: a copy in another type."""
    plain = sq.export(golden, "hf", tmp_path / "plain", dtype="float32")
    written = sq.load_checkpoint(plain)
    stored = load_file(golden / "model.safetensors")
    assert written.tensors.keys() == stored.keys()
    for name, expected in stored.items():
        np.testing.assert_array_equal(written.tensor(name), expected.astype(np.float32))


@pytest.mark.parametrize("method", [m.name for m in METHODS.values() if not m.extra])
def test_every_method_is_undone_or_stays_folded(method, model, tmp_path):
    config = sq.QuantConfig("w4a16", method, "rtn", bits=4, group_size=32, kv_bits=8,
                            calibration_tokens=128, **WHOLE_TABLES)
    packed = quantized(model, tmp_path / "packed", config)
    plain = sq.export(packed, "hf", tmp_path / "plain", dtype="float32")
    tokens = zoo.random_tokens(40)[None]
    expected = logits(packed, tokens)
    np.testing.assert_allclose(logits(plain, tokens), expected, atol=TOLERANCE, rtol=0)


def test_mixed_bits_and_dense_linears_are_read(model, tmp_path):
    config = sq.QuantConfig("w4a8", bits=5.5, ignore=("*.1.mlp.down_proj",), head_bits=6,
                            calibration_tokens=128)
    packed = quantized(model, tmp_path / "packed", config)
    plain = sq.export(packed, "hf", tmp_path / "plain", dtype="float32")
    view = UnpackedCheckpoint(load_checkpoint(packed))
    written = load_checkpoint(plain)
    rows = np.arange(320)
    np.testing.assert_array_equal(written.embedding, load_checkpoint(packed).embedding.gather(rows))
    for i in range(2):
        for role, linear in view.layer(i).linears.items():
            np.testing.assert_array_equal(written.layer(i).linears[role].weight, linear.weight)
    assert sq.load(plain).forward(zoo.random_tokens(8)[None]).shape == (1, 8, 320)


# ---- rotated ------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", GOLDEN, indirect=True)
def test_rotated_family_computes_the_same_or_is_refused(golden, tmp_path):
    out, tokens = tmp_path / "rotated", np.load(golden / "tokens.npy")[None]
    if golden.name not in zoo.COMMUTING:
        with pytest.raises(ValueError, match="expected RMSNorms in front"):
            sq.export(golden, "rotated-hf", out, fuse="rotation")
        assert not list(tmp_path.glob("rotated*"))
        return
    sq.export(golden, "rotated-hf", out, dtype="float32", fuse="rotation")
    np.testing.assert_allclose(logits(out, tokens), logits(golden, tokens), atol=TOLERANCE, rtol=0)
    found, spec = load_checkpoint(out), load_checkpoint(golden).spec
    assert {name for name, _ in found.spec.tensors()} == (
        {name for name, _ in spec.tensors()} | {f"{spec.head}.weight"})
    for place, norm in [*found.layer(1).norms.items(), ("final", found.final_norm)]:
        if place in ("before_attention", "before_mlp", "final"):
            assert (norm.weight + spec.final_norm.offset == 1).all(), place


@pytest.mark.parametrize("method", ["aligned", "quarot"])
def test_packed_folder_is_rotated_once(method, model, tmp_path):
    config = sq.QuantConfig("w4a16", method, "rtn", bits=4, calibration_tokens=128, **WHOLE_TABLES)
    packed = quantized(model, tmp_path / "packed", config)
    plain = sq.export(packed, "hf", tmp_path / "plain", dtype="float32")
    rotated = sq.export(packed, "rotated-hf", tmp_path / "rotated", dtype="float32",
                        fuse="rotation")
    tokens = zoo.random_tokens(40)[None]
    np.testing.assert_allclose(logits(rotated, tokens), logits(packed, tokens), atol=TOLERANCE,
                               rtol=0)
    name = "model.layers.1.mlp.up_proj.weight"
    same = np.array_equal(*(load_checkpoint(f).tensor(name) for f in (plain, rotated)))
    assert same == (method == "quarot")


def test_seed_gives_the_rotation(model, tmp_path):
    seeds = {"a": 0, "b": 0, "c": 1}
    found = {name: load_checkpoint(sq.export(model, "rotated-hf", tmp_path / name, seed=seed,
                                             fuse="rotation")).fingerprint
             for name, seed in seeds.items()}
    assert found["a"] == found["b"] != found["c"]


# ---- the folder ---------------------------------------------------------------------------------


@pytest.fixture
def packed(model, tmp_path):
    (model / "chat_template.jinja").write_text("{{ messages }}")
    write_json(model / "generation_config.json", {"eos_token_id": 1})
    return quantized(model, tmp_path / "packed")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_folder_has_all_files_and_weights_of_the_type(dtype, packed, model, tmp_path):
    plain = sq.export(packed, to="hf", output=tmp_path / "plain", dtype=dtype)
    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "generation_config.json"}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert set(os.listdir(plain)) == kept | shards | {"config.json", "model.safetensors.index.json"}
    for name in kept:
        assert (plain / name).read_bytes() == (model / name).read_bytes()
    config, own = (json.loads((f / "config.json").read_text()) for f in (plain, model))
    keys = [key for key in ("dtype", "torch_dtype") if key in own]
    assert keys
    assert config == own | dict.fromkeys(keys, dtype)
    assert sq.load_checkpoint(plain).dtype == dtype
    index = json.loads((plain / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards


def test_weights_are_those_of_float32_rounded_once(packed, tmp_path):
    exact = load_checkpoint(sq.export(packed, "hf", tmp_path / "exact", dtype="float32"))
    plain = load_checkpoint(sq.export(packed, "hf", tmp_path / "plain"))
    for name in exact.tensors:
        expected = exact.tensor(name).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(plain.tensor(name), expected)


def test_command_writes_the_same_bytes_and_says_what_is_lost(model, tmp_path, text, capsys):
    packed = quantized(model, tmp_path / "packed", sq.QuantConfig(bits=4, calibration_tokens=128))
    sq.export(packed, "hf", tmp_path / "a", dtype="float16")
    assert main(["export", str(packed), "--to", "hf", "--output", str(tmp_path / "b"), "--dtype",
                 "float16"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'b'}: hf, float16\n")
    assert "activations 8 bits -> not quantized" in said
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_one_linear_is_in_memory_at_a_time(packed):
    """A layer of the view holds packed linears; each look-up makes its weight anew."""
    linears = UnpackedCheckpoint(load_checkpoint(packed)).layer(0).linears
    assert linears["q"].weight is not linears["q"].weight
    assert set(linears) == {"q", "k", "v", "o", "gate", "up", "down"}


# ---- refusals -----------------------------------------------------------------------------------


def test_unknown_format_and_type_are_named(packed, tmp_path):
    with pytest.raises(ValueError, match=f"to: expected one of {', '.join(FORMATS)}, found 'onnx'"):
        sq.export(packed, "onnx", tmp_path / "plain")
    with pytest.raises(ValueError, match="dtype: expected one of bfloat16, .*, found 'int8'"):
        sq.export(packed, "hf", tmp_path / "plain", dtype="int8")


def test_existing_folder_is_left_alone(packed, tmp_path, capsys):
    (tmp_path / "plain").mkdir()
    line = failing(capsys, "export", packed, "--to", "hf", "--output", tmp_path / "plain")
    assert line == f"singlequant: {tmp_path / 'plain'} already exists"
    assert not any((tmp_path / "plain").iterdir())


def test_output_inside_the_model_is_refused(packed, capsys):
    line = failing(capsys, "export", packed, "--to", "hf", "--output", packed / "plain")
    assert f"OUT: expected a folder outside of {packed}" in line


def test_weights_beyond_float16_are_named_and_nothing_is_left(model, tmp_path, capsys):
    stored = load_file(model / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    stored = {key: value.astype(np.float32) for key, value in stored.items()}
    stored[name][3] = 1e5
    save_file(stored, model / "model.safetensors")
    line = failing(capsys, "export", model, "--to", "hf", "--output", tmp_path / "deep" / "plain",
                   "--dtype", "float16")
    assert f"{name}: expected values up to 65504, as float16 has no larger ones, found 1" in line
    assert not (tmp_path / "deep").exists()
    assert sq.export(model, "hf", tmp_path / "plain").is_dir()  # bfloat16 holds them


def test_nan_is_named(model, tmp_path):
    stored = load_file(model / "model.safetensors")
    stored["model.norm.weight"][0] = np.nan
    save_file(stored, model / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight, rows 0 to 63: "):
        sq.export(model, "hf", tmp_path / "plain")
    assert not (tmp_path / "plain.partial").exists()


@pytest.mark.parametrize(("key", "value", "named"), [
    ("model_type", None, "model_type: expected a name, as transformers opens a folder by it"),
    ("rms_norm_eps", 0.5, "expected the model that its weights are of, found other"),
    ("architectures", ["NoneForCausalLM"], "architectures: expected one of"),
])
def test_config_json_that_is_not_of_the_weights_is_refused(key, value, named, packed, tmp_path):
    config = json.loads((packed / "config.json").read_text())
    write_json(packed / "config.json", config | {key: value})
    sq.load_checkpoint(packed)  # it goes by quantization_config.model alone
    with pytest.raises(sq.FormatError, match=named):
        sq.export(packed, "hf", tmp_path / "plain")


def test_only_packed_checkpoints_are_unpacked(source):
    with pytest.raises(ValueError, match="checkpoint: expected a packed one"):
        UnpackedCheckpoint(source)


def test_cancelling_leaves_nothing(packed, tmp_path):
    def cancel(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        sq.export(packed, "hf", tmp_path / "plain", progress=cancel)
    assert not list(tmp_path.glob("plain*"))


def test_rows_of_a_fused_tensor_are_views():
    """What is assigned to them lands in the tensor."""
    for name in ("gpt-oss-tied", "gpt2-tied", "phi3-longrope", "falcon-40b", "bloom-power-of-two"):
        spec = load_checkpoint(FAMILIES / name).spec
        for place in spec.layer(0).linears.values():
            for tensor, shape in place.tensors(0):
                stored = np.zeros(shape)
                ndim = 1 if place.bias and tensor == place.bias_name(0) else 2
                hf.stored_rows(place, stored, ndim)[...] = 1
                size = place.n * (place.k if ndim == 2 else 1)
                assert stored.sum() == size, (name, tensor)


def test_page_has_a_row_for_every_format():
    page = (Path(__file__).resolve().parents[1] / "docs" / "exports.md").read_text()
    assert re.findall(r"^\| `(\w[\w-]*)` \|", page, flags=re.M) == [*FORMATS]
