# SPDX-License-Identifier: Apache-2.0
"""Messages repeat names of files' contents: never their control characters, nor all of a long one.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import edit_config, write_json
from safetensors.numpy import load_file, save_file

from singlequant.cli.main import main, show_warning
from singlequant.sweep.measure import one_line, reason

HOSTILE = "model.layers.0.\x1b[2J\x9b5A\a\b\u202e" + "x" * 100_000


def add_tensor(folder, name):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: np.ones(3, np.float32)}, folder / "model.safetensors")


def rename_in_index(folder, name):
    write_json(folder / "model.safetensors.index.json", {"weight_map": {name: name}})
    (folder / "model.safetensors").unlink()


def add_token(folder, name):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"][name] = 10**6
    tokenizer["added_tokens"].append({"id": 10**6, "content": name, "special": False})
    write_json(folder / "tokenizer.json", tokenizer)


PLACES = {
    "tensor": add_tensor,
    "tensor beside the model's": lambda folder, name: add_tensor(folder, f"tower.{name}"),
    "index": rename_in_index,
    "architecture": lambda folder, name: edit_config(folder, architectures=[name]),
    "value": lambda folder, name: edit_config(folder, hidden_act=name),
    "key": lambda folder, name: (folder / "config.json").write_text(
        json.dumps({"a": 1})[:-1] + f", {json.dumps(name)}: 1, {json.dumps(name)}: 2}}"),
    "token": add_token,
}


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("place", PLACES)
def test_what_files_say_cannot_disturb_the_terminal(make_checkpoint, tmp_path, capsys, place):
    folder = make_checkpoint(tmp_path / "model")
    PLACES[place](folder, HOSTILE)
    main(["generate", str(folder), "--prompt", HOSTILE[15:40], "--max-new-tokens", "1"])
    error = capsys.readouterr().err
    assert len(error.splitlines()) <= 2  # a warning and an error
    for line in error.splitlines():
        assert line.isprintable()
        assert len(line) < 700


@pytest.mark.parametrize(("text", "expected"), [
    ("a\n b\t\tc", "a b c"), ("", ""), ("\x1b[31mred\x00", "?[31mred?"), ("größer", "größer"),
    ("x" * 200, "x" * 200), ("\udc80", "?")])
def test_one_line_keeps_what_can_be_shown(text, expected):
    assert one_line(text) == expected


def test_long_texts_keep_their_ends():
    word = one_line("/begin/" + "x" * 1000 + "/end.json")
    assert len(word) == 200
    assert word.startswith("/begin/")
    assert word.endswith("/end.json")
    assert "..." in word
    line = one_line("first " + "word " * 1000 + "last")
    assert len(line) == 600
    assert line.startswith("first")
    assert line.endswith("last")


def test_nameless_errors_have_the_name_of_their_type(capsys):
    assert reason(MemoryError()) == "MemoryError"
    show_warning("a\x1bb")
    assert capsys.readouterr().err == "singlequant: warning: a?b\n"
