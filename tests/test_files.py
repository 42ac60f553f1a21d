# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and what stands where a file should be."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

import pytest

from singlequant import files
from singlequant.files import whole_file, write_file

# ---- whole or not at all ------------------------------------------------------------------------


def test_name_is_given_after_the_bytes_and_made_durable(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def note_sync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("name") or replace(a, b))
    write_file(tmp_path / "a", "text")
    assert done == ["file", "name", "folder"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_file_of_others_that_seems_unfinished_is_left(tmp_path, error):
    (tmp_path / "a.tmp").write_text("years")
    with contextlib.suppress(KeyboardInterrupt), whole_file(tmp_path / "a") as file:
        file.write(b"new")
        if error:
            raise error
    assert (tmp_path / "a.tmp").read_text() == "years"
    assert {path.name for path in tmp_path.iterdir()} == {"a.tmp"} | ({"a"} - {error and "a"})


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, step):
    def full(*_, **__):
        temporary = str(tmp_path / f"a{files.TEMPORARY}")
        name = {"open": (temporary,), "replace": (temporary, None, str(tmp_path / "a"))}
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *name.get(step, ()))

    def write():
        with whole_file(tmp_path / "a") as file:
            if step == "write":
                full()
            file.write(b"new")

    write_file(tmp_path / "a", "old")
    if step != "write":
        owner = type(tmp_path) if step == "open" else os
        monkeypatch.setattr(owner, step, full)
    with pytest.raises(OSError, match="No space left") as caught:
        write()
    monkeypatch.undo()
    assert caught.value.filename == str(tmp_path / "a")
    assert caught.value.filename2 is None
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_file_systems_that_cannot_sync_folders_are_no_error(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    files.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "error")))
    with pytest.raises(OSError, match="error"):
        files.sync_folder(tmp_path)
