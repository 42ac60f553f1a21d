"""Embedding and head in 8 and 4 bits: what is stored, what runs, what keeps 16, what is refused."""

import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from conftest import write_json
from packed_folders import write
from safetensors.numpy import load_file, save_file

import singlequant as sq
from singlequant import _C, _reference as reference
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.cli.main import main
from singlequant.config import QuantConfig
from singlequant.methods.quarot import quarot_checkpoint
from singlequant.runtime.outer import Outer
from singlequant.weights import PackedTable

SEED = 3
EMBED, HEAD = "model.embed_tokens", "lm_head"
FAMILIES = Path(__file__).parent / "data" / "families"
FAST = {"method": "none", "weights": "rtn", "bits": 4, "calibration_tokens": 64}


def wide(table):
    """A table [rows, width] in float64."""
    if isinstance(table, PackedTable):
        return reference.rows_of_codes(table.codes, table.scales.view(np.uint16), table.bits,
                                       table.shape[1])
    return table.astype(np.float64)


def stored_bits(checkpoint):
    return [table.bits if isinstance(table, PackedTable) else 16
            for table in (checkpoint.embedding, checkpoint.head)]


@pytest.mark.parametrize(("tied", "given", "expected"), [
    (True, {}, [8, 8]),
    (True, {"head_bits": 4}, [4, 4]),
    (True, {"head_bits": 6}, [6, 6]),
    (True, {"embedding_bits": 16}, [16, 16]),
    (True, {"ignore": (HEAD,)}, [16, 16]),
    (False, {}, [8, 8]),
    (False, {"head_bits": 4}, [8, 4]),
    (False, {"embedding_bits": 16, "head_bits": 8}, [16, 8]),
    (False, {"embedding_bits": 6, "head_bits": 4}, [6, 4]),
    (False, {"ignore": ("*embed*",), "embedding_bits": 4}, [16, 8]),
])
def test_bits_that_are_stored(make_checkpoint, tmp_path, out, tied, given, expected):
    source = load_checkpoint(make_checkpoint(tmp_path / "m", tie=tied, dtype="bfloat16"))
    write(source, out, QuantConfig(**given))
    packed = load_checkpoint(out)
    assert stored_bits(packed) == expected
    for name, bits, found, given_table in zip((EMBED, HEAD), expected,
                                              (packed.embedding, packed.head),
                                              (source.embedding, source.head), strict=True):
        if bits == 16:
            assert found.tobytes() == given_table.tobytes()
        else:
            codes, scales = _C.quantize_rows(given_table, bits)
            assert found.codes.tobytes() == codes.tobytes()
            assert found.scales.tobytes() == scales.tobytes()
        own = f"{name}.weight" in packed.tensors, f"{name}.weight_codes" in packed.tensors
        assert own == ((bits == 16, bits < 16) if name == EMBED or not tied else (False, False))
    header = json.loads((out / "config.json").read_text())["quantization_config"]
    assert [header.get(key, 16) for key in ("embedding_bits", "head_bits")] == expected
    assert packed.dtype == {16: "bfloat16", 8: "int8", 6: "int6", 4: "int4"}[expected[0]]


def test_codes_stay_in_the_file(source, out):
    write(source, out)
    embedding = load_checkpoint(out).embedding
    assert not embedding.codes.flags.owndata
    assert not embedding.codes.flags.writeable
    assert "320x64, 8 bits" in repr(embedding)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("name", [
    "gemma2-tied", "gptj-partial", "granite-factors", "opt-350m", "bloom-power-of-two",
    "mixtral-tied"])
def test_families_read_codes_as_the_table_that_they_say(tmp_path, name, bits):
    """Scaled, projected, normalized embeddings; biased, scaled and capped logits; experts."""
    folder = FAMILIES / name
    config = QuantConfig(**FAST, head_bits=bits, embedding_bits=bits)
    windows = np.arange(64).reshape(2, 32)
    source = load_checkpoint(folder)
    layers = list(sq.solve_rotations(sq.calibrate(source, windows), "none"))
    out = sq.save(sq.quantize(source, layers, config), tmp_path / "out", source, config)
    packed = load_checkpoint(out)
    plain = SimpleNamespace(spec=packed.spec, outer={
        tensor: wide(table).astype(np.float32) if isinstance(table, PackedTable) else table
        for tensor, table in packed.outer.items()})
    coded, exact = Outer(packed), Outer(plain)
    tokens, position = np.arange(20) % packed.spec.vocab, np.arange(20)
    hidden = coded.embed(tokens, position)
    np.testing.assert_array_equal(hidden, exact.embed(tokens, position))
    finished = coded.finish(hidden)
    expected = exact.logits(finished)
    head = packed.outer.get(f"{packed.spec.head}.weight", packed.embedding)
    step = reference.linear_rows_bound(finished, *head._bytes, bits) * packed.spec.logit_scale
    assert (np.abs(coded.logits(finished) - expected) <= 1e-5 * np.abs(expected).max() + step).all()


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_logits_do_not_depend_on_the_batch(table, source, out, rng, bits):
    write(source, out, QuantConfig(head_bits=bits))
    outer = Outer(load_checkpoint(out))
    hidden = rng.standard_normal((133, 64)).astype(np.float32)  # more than two chunks of rows
    whole = outer.logits(hidden)
    for rows in (slice(0, 1), slice(60, 70), slice(131, 133)):
        np.testing.assert_array_equal(outer.logits(hidden[rows]), whole[rows])
    np.testing.assert_array_equal(outer.logits(hidden[None, 5]), whole[None, 5])


def test_a_rotated_residual_stream_is_rounded_too(source, out, text):
    """QuaRot unties the head and gives float32 arrays: a table each, of the bits asked for one."""
    config = QuantConfig(method="quarot", weights="rtn", head_bits=4, calibration_tokens=64)
    sq.quantize_folder(source, out, config, text)
    packed, view = load_checkpoint(out), quarot_checkpoint(source)
    assert stored_bits(packed) == [4, 4]
    assert packed.embedding.codes.tobytes() == _C.quantize_rows(view.embedding, 4)[0].tobytes()
    again = QuantConfig.from_file(out / "recipe.json")
    assert (again.head_bits, again.embedding_bits) == (4, 4)
    sq.quantize_folder(source, out.with_name("again"), again, text)
    shard = "model-00001-of-00003.safetensors"
    assert (out / shard).read_bytes() == (out.with_name("again") / shard).read_bytes()


def test_different_bits_of_one_table_are_refused(source, out):
    config = QuantConfig(head_bits=16, embedding_bits=8)
    message = "embedding_bits: the model's head is its embedding, stored once: expected 16"
    with pytest.raises(ValueError, match=message):
        sq.quantize_folder(source, out, config)
    with pytest.raises(ValueError, match=message):
        sq.dry_run(source, config)
    assert not out.exists()


@pytest.mark.parametrize("name", ["head_bits", "embedding_bits"])
@pytest.mark.parametrize("bad", [0, 5, 32, 8.0, "8", True])
def test_config_refuses_other_bits(name, bad):
    with pytest.raises(ValueError, match=f"{name}: expected one of 4, 6, 8, 16, found"):
        QuantConfig(**{name: bad})


def test_nan_in_a_table_is_named(make_checkpoint, tmp_path, out):
    folder = make_checkpoint(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{EMBED}.weight"][7, 3] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"embed_tokens: table, row 7: NaN or Inf found"):
        write(load_checkpoint(folder), out)
    assert not out.exists()


def test_command_line_takes_the_bits(model, out, text, capsys):
    options = ["quantize", str(model), str(out), "--weights", "rtn", "--calibration", str(text),
               "--calibration-tokens", "64"]
    assert main([*options, "--head-bits", "4"]) == 0
    assert stored_bits(load_checkpoint(out)) == [4, 4]
    other = [*options, "--head-bits", "4", "--embedding-bits", "8"]
    assert main([*other[:2], f"{out}2", *other[3:]]) != 0
    assert "embedding_bits: the model's head is its embedding" in capsys.readouterr().err


def test_a_run_of_other_bits_is_not_resumed(source, out, text):
    with pytest.raises(KeyboardInterrupt):
        sq.quantize_folder(source, out, QuantConfig(**FAST), text, progress=interrupt)
    with pytest.raises(ValueError, match=r"cannot resume: config\.embedding_bits: expected 16, "
                                         r"found 8"):
        sq.quantize_folder(source, out, QuantConfig(**FAST, head_bits=16), text, resume=True)


def interrupt(done, total):
    raise KeyboardInterrupt


# ---- hostile folders ----------------------------------------------------------------------------


def change(folder, **changes):
    """Tensors of the first shard, replaced or, by None, removed; the index follows."""
    shard, index = folder / "model-00001-of-00003.safetensors", "model.safetensors.index.json"
    tensors, entries = load_file(shard), json.loads((folder / index).read_text())
    for part, value in changes.items():
        name = f"{EMBED}.{part}"
        tensors.pop(name, None)
        entries["weight_map"].pop(name, None)
        if value is not None:
            tensors[name] = value
            entries["weight_map"][name] = shard.name
    save_file(tensors, shard)
    write_json(folder / index, entries)


@pytest.mark.parametrize(("changes", "message"), [
    ({"weight_scale": None}, r"weight_scale: missing tensor, expected shape \[320, 2\]"),
    ({"weight_codes": None}, r"weight_codes: missing tensor, expected shape \[320, 64\]"),
    ({"weight_codes": np.zeros((320, 32), np.uint8)}, "weight_codes: expected dtype I8, found U8"),
    ({"weight_codes": np.zeros((320, 32), np.int8)}, r"expected shape \[320, 64\], found"),
    ({"weight_scale": np.ones((320, 1), ml_dtypes.bfloat16)}, r"expected shape \[320, 2\], found"),
    ({"weight_scale": np.ones((320, 2), np.float32)}, "expected dtype BF16, found F32"),
    ({"weight": np.ones((320, 64), np.float16)}, "expected weight_codes alone, as it has 8 bits"),
    ({"weight_bits": np.ones(1, np.int64)}, r"weight_bits: unexpected tensor"),
])
def test_hostile_tables_are_refused(source, out, changes, message):
    write(source, out)
    change(out, **changes)
    with pytest.raises(sq.FormatError, match=message):
        load_checkpoint(out)


def test_hostile_scales_are_refused(source, out):
    write(source, out)
    scales = np.ones((320, 2), ml_dtypes.bfloat16)
    scales[9] = np.nan
    change(out, weight_scale=scales)
    with pytest.raises(sq.FormatError, match=r"embed_tokens\.weight_scale: expected finite"):
        load_checkpoint(out).embedding  # noqa: B018


@pytest.mark.parametrize(("values", "message"), [
    ({"head_bits": 5}, "head_bits: expected one of 4, 6, 8, 16, found 5"),
    ({"head_bits": 4}, "embedding_bits: the model's head is its embedding"),
    ({"head_bits": 16, "embedding_bits": 16}, r"embed_tokens\.weight: missing tensor"),
    ({"head_bits": None, "embedding_bits": None}, "head_bits, embedding_bits: expected numbers"),
])
def test_hostile_headers_are_refused(source, out, values, message):
    write(source, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= values
    write_json(out / "config.json", config)
    with pytest.raises(sq.FormatError, match=message):
        load_checkpoint(out)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_table_is_read_where_it_lies(bits):
    table = np.random.default_rng(0).standard_normal((4096, 256)).astype(np.float32)
    packed, x = PackedTable.of(table, bits, "table"), np.ones((1, 256), np.float32)
    tracemalloc.start()
    packed.linear(x)
    packed.gather(np.arange(3))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < packed.codes.nbytes / 8
