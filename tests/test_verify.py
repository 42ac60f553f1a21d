# SPDX-License-Identifier: Apache-2.0
"""`singlequant verify`: any changed bit of a packed folder is found; faults have a line each."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import random_layer
from packed_folders import CONFIG, ORDERS, Q0, edit_tensors, write
from test_golden import GOLDEN

from singlequant.checkpoint.folder import load_checkpoint
from singlequant.checkpoint.verify import verify_folder
from singlequant.cli.main import main
from singlequant.config import QuantConfig
from singlequant.export.folder import json_bytes
from singlequant.export.seal import FILES, OWN_HASH, RECIPE_FILE, file_facts, sealed, unsealed
from singlequant.export.writer import ModelWriter
from singlequant.sweep.run import quantize_folder

BITS = 100


@pytest.fixture
def sound(source, out):
    write(source, out, orders=ORDERS)
    return out


def reseal(folder: Path, **changes) -> None:
    """Gives a changed folder the hashes of what it holds now, so that only contents are wrong."""
    recipe = json.loads((folder / RECIPE_FILE).read_text())
    names = [path.name for path in folder.iterdir() if path.name != RECIPE_FILE]
    files = {name: file_facts(folder / name) for name in names} | changes
    facts = {key: recipe[key] for key in ("kernels", "shards")}
    (folder / RECIPE_FILE).write_bytes(json_bytes(sealed(unsealed(recipe), files, **facts)))


def faults(folder: Path, **options) -> list[str]:
    return list(verify_folder(folder, **options))


def test_what_was_written_has_no_fault(sound, source, capsys):
    assert faults(sound, source=source) == []
    assert main(["verify", str(sound), "--source", str(source.path)]) == 0
    assert capsys.readouterr().out == f"{sound}: as it was written, and sound\n"


def test_every_file_is_sealed(sound):
    seal = json.loads((sound / RECIPE_FILE).read_text())
    assert {*seal[FILES], RECIPE_FILE} == {path.name for path in sound.iterdir()}
    assert list(seal["shards"]) == ["outer", "0", "1"]
    assert list(seal)[-1] == OWN_HASH


def flip(path: Path, bit: int) -> None:
    """Turns one bit of a file over."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_every_one_of_100_single_bits_is_found(sound, capsys):
    """Bits are drawn from all files alike, so that small files and the seal itself are hit."""
    rng = np.random.default_rng(0)
    files = sorted(path for path in sound.iterdir())
    hit = set()
    for i in range(BITS):
        path = files[i % len(files)]
        bit = int(rng.integers(8 * path.stat().st_size))
        flip(path, bit)
        assert main(["verify", str(sound)]) == 1, (path.name, bit)
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith(str(path)) for line in lines), (path.name, bit, lines)
        flip(path, bit)
        hit.add(path.name)
    assert hit == {path.name for path in sound.iterdir()}
    assert main(["verify", str(sound)]) == 0


def test_every_bit_of_the_seal_is_found(sound):
    recipe = sound / RECIPE_FILE
    for bit in range(0, 8 * recipe.stat().st_size, 7):  # 7: each place of a byte comes up
        flip(recipe, bit)
        assert any(str(recipe) in line for line in faults(sound)), bit
        flip(recipe, bit)
    assert faults(sound) == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json",
                                  "model-00002-of-00003.safetensors"])
def test_lost_and_shortened_files_are_named(sound, name):
    size = (sound / name).stat().st_size
    os.truncate(sound / name, size - 1)
    assert f"{sound / name}: bytes: expected {size}, found {size - 1}" in faults(sound)
    (sound / name).unlink()
    assert f"{sound / name}: expected a file of {size} bytes, found none" in faults(sound)


@pytest.mark.parametrize("name", ["chat_template.jinja", "model.safetensors"])
def test_added_file_that_would_be_read_is_named(sound, name):
    shutil.copyfile(sound / "model-00001-of-00003.safetensors", sound / name)
    assert f"{sound / name}: expected a file that recipe.json names, found another" in faults(sound)


def test_file_that_nobody_reads_is_no_fault(sound):
    (sound / "NOTES.md").write_text("a model card")
    assert faults(sound) == []


@pytest.mark.parametrize(("name", "change", "text"), [
    (f"{Q0}.weight_scale", lambda x: np.where(np.arange(64)[:, None] == 5, np.nan, x),
     "expected finite scales of at least 0"),
    (f"{Q0}.weight_scale", lambda x: -x, "expected finite scales of at least 0"),
    (f"{Q0}.weight_shape", lambda x: x + 1, r"expected \[64, 64\], found \[65, 65\]"),
    ("model.layers.0.rotations.qkv.left", lambda x: x * np.float32(1.001), "orthogonal"),
    ("model.layers.0.rotations.o.right", lambda x: x * np.float32("nan"), "orthogonal|finite"),
    ("model.layers.0.activations.o.clip", lambda _: np.array([1.5], np.float32),
     r"expected a number in \(0, 1\]"),
    ("model.layers.0.activations.o.high", lambda _: np.array([33]), "expected a multiple of 32"),
    ("model.layers.0.input_layernorm.weight", lambda x: np.full_like(x, np.inf), "NaN or Inf"),
])
def test_content_that_cannot_be_has_one_line(sound, name, change, text):
    checkpoint = load_checkpoint(sound)
    old = checkpoint.tensor(name).copy() if name in checkpoint.tensors else None
    new = np.ascontiguousarray(change(old))
    edit_tensors(sound, **{name: new if old is None else new.astype(old.dtype)})
    reseal(sound)
    (line,) = faults(sound)
    assert name in line
    assert re.search(text, line), line


def test_faults_of_several_parts_have_a_line_each(sound):
    scale = load_checkpoint(sound).tensor(f"{Q0}.weight_scale")
    edit_tensors(sound, **{
        f"{Q0}.weight_scale": -scale,
        "model.layers.0.activations.o.clip": np.array([2], np.float32),
        "model.layers.0.input_layernorm.weight": np.full(64, np.nan, np.float32)})
    reseal(sound)
    assert len(faults(sound)) == 3


@pytest.mark.parametrize("bits", [4, 6])
def test_codes_behind_the_last_column_of_a_table_are_checked(make_checkpoint, tmp_path, bits):
    source = load_checkpoint(make_checkpoint(tmp_path / "m", hidden=72, heads=3, kv_heads=3))
    out = tmp_path / "out"
    quantize_folder(source, out, QuantConfig(bits=4, head_bits=bits, method="none",
                                             weights="rtn", calibration_tokens=64))
    assert faults(out) == []
    name = "model.embed_tokens.weight_codes"
    path = load_checkpoint(out).tensors[name]
    with path.path.open("r+b") as file:
        file.seek(path.begin + path.shape[1] - 1 if bits == 6 else path.begin + path.shape[1] - 8)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))
    reseal(out)
    (line,) = faults(out)
    assert "weight_codes: expected code 0 behind column 71, found others" in line


def test_another_source_is_named_layer_by_layer(sound, make_checkpoint, tmp_path):
    other = load_checkpoint(make_checkpoint(tmp_path / "other", seed=1))
    lines = faults(sound, source=other)
    assert [line.split(": ")[1] for line in lines] == ["outer", "layer 0", "layer 1"]


@pytest.mark.parametrize("name", sorted(p.name for p in GOLDEN.iterdir() if p.is_dir()))
def test_folder_of_before_there_were_hashes_says_so(name):
    (line,) = faults(GOLDEN / name / "packed")
    assert "recipe.json: files, sha256: expected the hashes of the folder's files" in line


def test_no_folder_and_an_unquantized_one_are_named(tmp_path, source, capsys):
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"singlequant: {tmp_path / 'none'}: no such folder\n"
    assert main(["verify", str(source.path)]) == 1
    assert "expected a packed folder, found no quantization_config" in capsys.readouterr().out


def test_resume_makes_a_shard_again_whose_bytes_changed(source, out):
    def run():
        with ModelWriter(out, source, CONFIG) as writer:
            writer.write_layer(random_layer(source, CONFIG, 0)[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    shard = out.with_name("out.partial") / "model-00002-of-00003.safetensors"
    flip(shard, 8 * shard.stat().st_size - 1)
    with ModelWriter(out, source, CONFIG, resume=True) as writer:
        assert writer.finished_layers() == set()
