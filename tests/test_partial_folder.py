# SPDX-License-Identifier: Apache-2.0
"""OUT.partial: what a run may delete there, and which finished layers a later run may take over."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from conftest import random_layer
from packed_folders import CONFIG, partial, write
from safetensors.numpy import load_file, save_file

from singlequant._C import FormatError
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.export import partial as partial_module
from singlequant.export.partial import JOURNAL_FILE
from singlequant.export.writer import ModelWriter
from singlequant.files import TEMPORARY


def stop_after_layer_0(source, out, error, **options):
    def run():
        with ModelWriter(out, source, CONFIG, **options) as writer:
            writer.write_layer(random_layer(source, CONFIG, 0)[0])
            raise error

    with pytest.raises(type(error)):
        run()


def contents(folder):
    """Every entry below a folder, with its bytes where it has some."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


# ---- what is not the run's own ------------------------------------------------------------------

FOREIGN = {
    "a file": lambda folder: (folder / "thesis.txt").write_text("years"),
    "a file that is hidden": lambda folder: (folder / ".thesis").write_text("years"),
    "a file that seems unfinished": lambda folder: (folder / "thesis.tmp").write_text("years"),
    "an empty folder": lambda folder: (folder / "sub").mkdir(),
    "a folder of files": lambda folder: [(folder / "sub").mkdir(),
                                         (folder / "sub" / "thesis.txt").write_text("years")],
    "a file among templates": lambda folder: [
        (folder / "additional_chat_templates").mkdir(),
        (folder / "additional_chat_templates" / "thesis.txt").write_text("years")],
    "a link": lambda folder: (folder / "link").symlink_to(folder.parent),
    "a link to nothing": lambda folder: (folder / "link").symlink_to("nowhere"),
    "a folder of the name of a shard": lambda folder: [
        (folder / "model-00003-of-00003.safetensors").unlink(missing_ok=True),
        (folder / "model-00003-of-00003.safetensors").mkdir()],
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("beside", ["nothing", "recipe.json", "run"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_others_put_there_is_named_and_left(source, out, kind, beside, resume):
    if beside == "run":
        stop_after_layer_0(source, out, KeyboardInterrupt())
    else:
        partial(out).mkdir()
    if beside == "recipe.json":
        (partial(out) / "recipe.json").write_text("{}")
    FOREIGN[kind](partial(out))
    before = contents(partial(out))
    named = r"thesis|sub|link|recipe\.json|model-00003|additional_chat_templates"
    with (
        pytest.raises(ValueError, match=rf"out\.partial: expected .*found .*({named})"),
        ModelWriter(out, source, CONFIG, resume=resume),
    ):
        pass
    assert contents(partial(out)) == before


@pytest.mark.parametrize("make", [
    lambda path: path.write_text("years"), lambda path: path.symlink_to("nowhere")])
def test_partial_that_is_no_folder_is_left(source, out, make):
    make(partial(out))
    with pytest.raises(ValueError, match="expected a folder"), ModelWriter(out, source, CONFIG):
        pass
    assert os.path.lexists(partial(out))


def test_finished_folder_of_that_name_is_left(source, out):
    write(source, partial(out))
    before = contents(partial(out))
    with pytest.raises(ValueError, match="found .*config.json"), ModelWriter(out, source, CONFIG):
        pass
    assert contents(partial(out)) == before


def test_journal_of_a_run_that_makes_another_folder_does_not_count(source, out):
    stop_after_layer_0(source, out, KeyboardInterrupt())
    other = out.with_name("other")
    partial(out).rename(partial(other))
    before = contents(partial(other))
    with (
        pytest.raises(ValueError, match="of a run that makes other"),
        ModelWriter(other, source, CONFIG),
    ):
        pass
    assert contents(partial(other)) == before


@pytest.mark.parametrize("values", [
    {"out": "out"}, {"out": "out", "files": "all", "layers": {}},
    {"out": "out", "files": [], "layers": []}, {"out": "out", "files": [], "layers": {"0": 1}}])
def test_journal_that_is_none_is_refused(source, out, values):
    partial(out).mkdir()
    (partial(out) / JOURNAL_FILE).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="journal"), ModelWriter(out, source, CONFIG):
        pass
    assert (partial(out) / JOURNAL_FILE).is_file()


def test_names_in_a_journal_reach_nothing_outside(source, out):
    out.with_name("thesis.txt").write_text("years")
    partial(out).mkdir()
    values = {"out": "out", "layers": {}, "files": ["../thesis.txt", str(out.parent / "thesis.txt"),
                                                    ".", "..", "", 5]}
    (partial(out) / JOURNAL_FILE).write_text(json.dumps(values))
    with ModelWriter(out, source, CONFIG):
        pass
    assert out.with_name("thesis.txt").read_text() == "years"


def test_failing_run_leaves_what_others_put_there_meanwhile(source, out):
    def run():
        with ModelWriter(out, source, CONFIG):
            (partial(out) / "thesis.txt").write_text("years")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="^stop$"):
        run()
    assert contents(partial(out)) == {"thesis.txt": b"years"}


def test_finishing_run_takes_along_what_others_put_there_meanwhile(source, out):
    with ModelWriter(out, source, CONFIG) as writer:
        (partial(out) / "thesis.txt").write_text("years")
        for i in range(2):
            writer.write_layer(random_layer(source, CONFIG, i)[0])
        writer.finish()
    assert (out / "thesis.txt").read_text() == "years"
    assert not (out / JOURNAL_FILE).exists()


def test_kill_while_the_first_journal_is_written_is_no_obstacle(source, out):
    partial(out).mkdir()
    (partial(out) / f"{JOURNAL_FILE}{TEMPORARY}").write_text("{")
    write(source, out)
    assert not partial(out).exists()


@pytest.mark.parametrize("kind", FOREIGN)
def test_finished_folder_is_replaced_unless_others_put_something_in(source, out, kind):
    write(source, out)
    FOREIGN[kind](out)
    before = contents(out)
    writer = ModelWriter(out, source, CONFIG, resumable=False, replace=True)
    with pytest.raises(ValueError, match=f"{out}: expected a folder of an earlier run, found "):
        writer.__enter__()
    assert contents(out) == before
    assert not partial(out).exists()


def test_finished_folder_is_replaced(source, out):
    write(source, out)
    before = contents(out)
    with ModelWriter(out, source, CONFIG, resumable=False, replace=True) as writer:
        assert not out.exists()
        for i in range(2):
            writer.write_layer(random_layer(source, CONFIG, i)[0])
        writer.finish()
    assert contents(out).keys() == before.keys()


# ---- which layers a later run takes over --------------------------------------------------------


def change(source, name):
    """The checkpoint with some values of one tensor changed, in none of the pages that the
    fingerprint looks at."""
    path = source.path / "model.safetensors"
    tensors = load_file(path)
    flat = tensors[name].reshape(-1)
    flat[2050:2060] += 1
    save_file(tensors, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)
    changed = load_checkpoint(source.path)
    assert changed.fingerprint == source.fingerprint
    return changed


@pytest.fixture
def wide(make_checkpoint, tmp_path):
    """A model whose tensors are larger than three pages."""
    return load_checkpoint(make_checkpoint(tmp_path / "wide", hidden=128, intermediate=96))


@pytest.mark.parametrize(("name", "refused"), [
    ("model.layers.0.mlp.up_proj.weight", "layer 0 of .*wide changed"),
    ("model.embed_tokens.weight", "what is outside the layers of .*wide changed"),
    ("model.layers.1.mlp.up_proj.weight", None),  # not read yet
])
def test_resume_refuses_what_was_made_of_other_values(wide, out, name, refused):
    stop_after_layer_0(wide, out, KeyboardInterrupt())
    before = contents(partial(out))
    changed = change(wide, name)
    if refused is None:
        with ModelWriter(out, changed, CONFIG, resume=True) as writer:
            assert writer.finished_layers() == {0}
        return
    with (
        pytest.raises(ValueError, match=f"cannot resume: {refused}"),
        ModelWriter(out, changed, CONFIG, resume=True),
    ):
        pass
    assert contents(partial(out)) == before


@pytest.mark.parametrize("refused", [False, True])
def test_file_that_is_written_to_while_it_is_read_is_named(wide, out, refused):
    """In place, its size the same. Layer 0 is whole before, and layer 1 does not count. refused:
    what is read of the other file is an error of its own."""
    path = wide.path / "model.safetensors"

    def run():
        with ModelWriter(out, wide, CONFIG) as writer:
            writer.write_layer(random_layer(wide, CONFIG, 0)[0])
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
            os.utime(path, ns=(1, 1))  # clocks of files are coarse
            if refused:
                raise ValueError("model.layers.1.mlp.up_proj.weight: not finite")
            writer.write_layer(random_layer(wide, CONFIG, 1)[0])

    with pytest.raises(FormatError, match=f"{path}: the file changed while it was read; 1 finish"):
        run()
    assert json.loads((partial(out) / JOURNAL_FILE).read_text())["layers"].keys() == {"outer", "0"}


def test_file_in_whose_place_another_comes_is_read_on(wide, out):
    path = wide.path / "model.safetensors"
    with ModelWriter(out, wide, CONFIG) as writer:
        shutil.copy(path, path.with_name("new"))
        os.replace(path.with_name("new"), path)
        writer.write_layer(random_layer(wide, CONFIG, 0)[0])
        path.unlink()
        writer.write_layer(random_layer(wide, CONFIG, 1)[0])


@pytest.mark.parametrize("part", ["table", "blas"])
def test_resume_refuses_other_kernels(source, out, part, monkeypatch):
    stop_after_layer_0(source, out, KeyboardInterrupt())
    names = partial_module.kernel_names()
    monkeypatch.setattr(partial_module, "kernel_names", lambda: {**names, part: "other"})
    with (
        pytest.raises(ValueError, match="cannot resume: kernels: expected .*other"),
        ModelWriter(out, source, CONFIG, resume=True),
    ):
        pass
    with ModelWriter(out, source, CONFIG) as writer:
        assert writer.finished_layers() == set()


def test_layer_that_the_journal_does_not_know_is_done_again(source, out):
    stop_after_layer_0(source, out, KeyboardInterrupt())
    path = partial(out) / JOURNAL_FILE
    values = json.loads(path.read_text())
    del values["layers"]["0"]
    path.write_text(json.dumps(values))
    with ModelWriter(out, source, CONFIG, resume=True) as writer:
        assert writer.finished_layers() == set()


def test_digest_covers_every_value_of_a_layer(source):
    digests = {partial_module.content_digest(source, "0")}
    spec, tensors = source.spec, load_file(source.path / "model.safetensors")
    for name, _ in spec.layer_tensors(0):
        for place in (0, -1):
            changed = {key: np.array(value) for key, value in tensors.items()}
            changed[name].reshape(-1)[place] += 1
            save_file(changed, source.path / "model.safetensors")
            digests.add(partial_module.content_digest(load_checkpoint(source.path), "0"))
    assert len(digests) == 1 + 2 * len(list(spec.layer_tensors(0)))
