# SPDX-License-Identifier: Apache-2.0
"""What an unfinished download leaves in place of a file is named as such, whichever file it is."""

from __future__ import annotations

import pytest
from conftest import write_json

import singlequant as sq
from singlequant import FormatError
from singlequant.sweep.text_file import first_tokens

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4359176\n"
FILES = ["config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors",
         "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
         "chat_template.json", "additional_chat_templates/rag.jinja"]


def write_pointer(path):
    path.write_text(POINTER)
    return "Git LFS pointer"


def write_dangling_link(path):
    path.symlink_to("../../blobs/gone")
    return "a link to ../../blobs/gone, which does not exist"


def use(model):
    """Whatever reads files of a folder."""
    loaded = sq.load(model)
    loaded.generate("a", max_new_tokens=1)
    loaded.chat_tokens([{"role": "user", "content": "a"}])


@pytest.fixture
def model(make_checkpoint, tmp_path):
    folder = make_checkpoint(tmp_path / "model", shards=2)
    write_json(folder / "special_tokens_map.json", {})
    write_json(folder / "added_tokens.json", {})
    return folder


@pytest.mark.parametrize("damage", [write_pointer, write_dangling_link])
@pytest.mark.parametrize("name", FILES)
def test_file_that_was_not_downloaded_is_named(model, name, damage):
    path = model / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    named = damage(path)
    with pytest.raises(FormatError, match=f"{name}.*{named}"):
        use(model)


@pytest.mark.parametrize("damage", [write_pointer, write_dangling_link])
def test_copies_are_checked_before_work_starts(model, tmp_path, text, damage):
    damage(model / "tokenizer.model")
    with pytest.raises(FormatError, match=r"tokenizer\.model"):
        sq.quantize_folder(model, tmp_path / "out", sq.QuantConfig(calibration_tokens=64), text)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("damage", [write_pointer, write_dangling_link])
def test_whole_model_that_was_not_downloaded_is_named(tmp_path, damage):
    named = damage(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match=named):
        sq.load(tmp_path / "model.gguf")


def test_small_files_are_no_pointers(model):
    (model / "chat_template.jinja").write_text("version")
    assert sq.load(model).chat_tokens([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("damage", [write_pointer, write_dangling_link])
def test_text_that_was_not_downloaded_is_named(model, tmp_path, damage):
    named = damage(tmp_path / "wiki.txt")
    config = sq.QuantConfig(calibration_tokens=64, calibration_window=8)
    for use in (lambda text: sq.calibration_windows(sq.load_checkpoint(model), config, text),
                lambda text: first_tokens(sq.load(model).encode, text)):
        with pytest.raises(FormatError, match=rf"wiki\.txt: .*{named}"):
            use(tmp_path / "wiki.txt")
