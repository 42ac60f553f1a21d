# SPDX-License-Identifier: Apache-2.0
"""Messages repeat names of files' contents: never their control characters, nor all of a long one.
"""

from __future__ import annotations

import json
import os
import resource
import signal

import numpy as np
import pytest
from conftest import edit_config, write_json
from safetensors.numpy import load_file, save_file

import singlequant as sq
from singlequant._C import FormatError
from singlequant.checkpoint.tokenizer_errors import keep_panics_quiet, tokenizer_errors
from singlequant.cli.main import describe, main, show_warning
from singlequant.runtime.text_stream import stream_text
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


def edit_tokenizer(folder, change):
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    write_json(folder / "tokenizer.json", values)


def prefix_longer_than_tokens(values):
    values["model"]["continuing_subword_prefix"] = "x" * 3000


def chunks_of_nothing(values):
    values["pre_tokenizer"] = {"type": "FixedLength", "length": 0}


def no_character_map(values):
    values["normalizer"] = {"type": "Precompiled"}


@pytest.mark.parametrize("change", [
    prefix_longer_than_tokens, no_character_map, chunks_of_nothing])
def test_panic_of_the_tokenizer_is_one_line(make_checkpoint, tmp_path, capfd, change):
    """Rust prints by itself, on descriptor 2."""
    folder = make_checkpoint(tmp_path / "model")
    edit_tokenizer(folder, change)
    code = main(["generate", str(folder), "--prompt", "the quick", "--max-new-tokens", "4"])
    error = capfd.readouterr().err
    assert (code, len(error.splitlines())) == (2, 1), error
    assert error.startswith(f"singlequant: {folder / 'tokenizer.json'}: the tokenizers library "
                            f"cannot use it: ")


def test_panic_of_the_decoder_names_the_file(make_checkpoint, tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    edit_tokenizer(folder, lambda values: values.update(
        decoder={"type": "Strip", "content": "z", "start": 0, "stop": 9}))
    model = sq.load(folder)
    z = model.tokenizer.token_to_id("z")
    message = r"tokenizer\.json: the tokenizers library cannot use it"
    with pytest.raises(FormatError, match=message):
        model.decode_after([], [z])
    stream = stream_text(model, [])
    with pytest.raises(FormatError, match=message):
        stream(z)


def fail(folder, error, printed):
    with tokenizer_errors(folder):
        os.write(2, printed)
        raise error


def test_only_a_panic_drops_what_is_printed_meanwhile(capfd, tmp_path):
    before = keep_panics_quiet(True)
    try:
        with tokenizer_errors(tmp_path):
            os.write(2, b"kept\n")
        with pytest.raises(FormatError, match="cannot use it: no"):
            fail(tmp_path, type("PanicException", (BaseException,), {})("no"), b"dropped\n")
        with pytest.raises(KeyboardInterrupt):
            fail(tmp_path, KeyboardInterrupt(), b"kept too\n")
    finally:
        assert keep_panics_quiet(before) is True
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "kept\nkept too\nafter\n"


@pytest.mark.parametrize("arguments", [
    ["eval", "model", "--threads", "9" * 5000], ["eval", "model", f"--{HOSTILE}"], [HOSTILE],
    ["quantize", "model", "out", "--method", HOSTILE]])
def test_what_arguments_say_cannot_disturb_the_terminal_either(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    *usage, line = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert usage[0].startswith("usage: singlequant")
    assert line.isprintable()
    assert len(line) < 1000


def test_file_that_finds_no_room_is_named_from_out_on(make_checkpoint, tmp_path, capsys, text):
    """A file-size limit fails as a full disk does, whose line has OUT's place twice."""
    model, out = make_checkpoint(tmp_path / "model"), tmp_path / "place" / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        code = main(["quantize", str(model), str(out), "--calibration", str(text),
                     "--calibration-tokens", "64", "--bits", "4"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert code == 2
    assert capsys.readouterr().err.startswith("singlequant: out.partial/model-00001-of-")
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize(("name", "advice"), [
    ("model-00002-of-00003.safetensors", "; 1 finished layer is in {out}.partial: go on"),
    ("config.json", ""),
])
def test_full_disk_names_out_once_and_no_folder_before_it(tmp_path, name, advice):
    out = tmp_path / "out"
    error = OSError(28, "No space left on device" + advice.format(out=out),
                    f"{out}.partial/{name}")
    assert describe(error, out) == (
        f"out.partial/{name}: No space left on device{advice.format(out='out')}")
    assert describe(error).startswith(f"{out}.partial/{name}: No space")


@pytest.mark.parametrize("name", ["out.partial", "out.partially/x", "elsewhere/out.partial/x"])
def test_other_places_are_named_whole(tmp_path, name):
    error = OSError(20, "Not a directory", str(tmp_path / name))
    assert describe(error, tmp_path / "out") == f"{tmp_path / name}: Not a directory"


def test_links_in_a_circle_are_one_line(make_checkpoint, tmp_path, capsys):
    model, circle = make_checkpoint(tmp_path / "model"), tmp_path / "circle"
    circle.symlink_to(circle)
    for arguments in ((model, circle / "out"), (circle, tmp_path / "out")):
        assert main(["quantize", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert "circle" in error
