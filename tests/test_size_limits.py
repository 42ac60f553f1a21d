# SPDX-License-Identifier: Apache-2.0
"""Files that are read whole have sizes that real ones have; larger ones are named, not read."""

from __future__ import annotations

import json
import os
import struct

import pytest

from singlequant import FormatError
from singlequant.cli.main import main
from singlequant.files import MAX_JSON_BYTES, MAX_LISTING_BYTES, MAX_TOKENIZER_BYTES, read_json
from singlequant.tensors import read_header

NAMES = {"config.json": MAX_JSON_BYTES, "generation_config.json": MAX_JSON_BYTES,
         "tokenizer_config.json": MAX_JSON_BYTES, "special_tokens_map.json": MAX_JSON_BYTES,
         "model.safetensors.index.json": MAX_LISTING_BYTES}


@pytest.mark.parametrize("name", NAMES)
def test_larger_file_is_named(model, name, capsys):
    path = model / name
    if name.endswith("index.json"):
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        path.write_text("{}")
    path.write_text(path.read_text() if path.is_file() else "{}")
    os.truncate(path, NAMES[name] + 1)
    assert main(["generate", str(model), "--prompt", "a", "--max-new-tokens", "1"]) == 2
    error = capsys.readouterr().err
    assert error == (f"singlequant: {path}: expected JSON of at most {NAMES[name]} bytes, "
                     f"found {NAMES[name] + 1}\n")


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["quantize"]])
def test_larger_tokenizer_is_named(model, tmp_path, command, capsys):
    path = model / "tokenizer.json"
    os.truncate(path, MAX_TOKENIZER_BYTES + 1)
    out = [str(tmp_path / "out")] if command == ["quantize"] else []
    assert main([command[0], str(model), *out, *command[1:]]) == 2
    assert capsys.readouterr().err == (
        f"singlequant: {path}: expected a tokenizer of at most {MAX_TOKENIZER_BYTES} bytes, found "
        f"{MAX_TOKENIZER_BYTES + 1}\n")


def test_larger_header_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    length = MAX_LISTING_BYTES + 1
    path.write_bytes(struct.pack("<Q", length))
    os.truncate(path, 8 + length)
    with pytest.raises(FormatError, match=rf"{path}: expected a header of at most "
                                          rf"{MAX_LISTING_BYTES} bytes, found {length}"):
        read_header(path)


def test_larger_recipe_and_larger_gguf_header_are_named(model, tmp_path, capsys):
    recipe = tmp_path / "recipe.json"
    recipe.write_text("{}")
    os.truncate(recipe, MAX_LISTING_BYTES + 1)
    assert main(["quantize", str(model), str(tmp_path / "out"), "--recipe", str(recipe)]) == 2
    assert f"{recipe}: expected JSON of at most {MAX_LISTING_BYTES}" in capsys.readouterr().err
    pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, MAX_LISTING_BYTES))
    os.truncate(path, MAX_LISTING_BYTES + 1000)
    assert main(["generate", str(path), "--prompt", "a"]) == 2
    assert f"{path}: expected a header of at most {MAX_LISTING_BYTES}" in capsys.readouterr().err


def test_index_of_the_most_tensors_that_are_published_is_read(tmp_path):
    """DeepSeek-V3's index has 91,991 tensors."""
    names = {f"model.layers.{i // 1536}.mlp.experts.{i % 256}.down_proj.weight_scale_inv {i}":
             "model-00001-of-000163.safetensors" for i in range(92_000)}
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": names}, indent=2))
    assert read_json(tmp_path / "index.json", MAX_LISTING_BYTES)["weight_map"] == names
