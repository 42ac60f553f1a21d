# SPDX-License-Identifier: Apache-2.0
"""OUT.partial: the folder of an unfinished run, its lock, and its journal.

The journal names every file that the run may write. A run deletes no other file, whatever its name.
It also says on what kernels the run works, and what each finished layer was made of.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import TEMPORARY, read_json, sync_folder, write_file
from ..info import kernel_names

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint

__all__ = ["JOURNAL_FILE", "PartialFolder", "add_advice", "content_digest", "source_digest",
           "source_of"]

JOURNAL_FILE = "singlequant-journal.json"


class PartialFolder:
    """The folder in which a run works until OUT has its name.

    files: relative names of all that the run may write. `layers` is the journal's part about
    finished layers, by their number as a string.
    """

    def __init__(self, out: Path, files: Iterable[str]) -> None:
        self.path = out.with_name(out.name + ".partial")
        self.layers: dict[str, dict[str, Any]] = {}
        self._out = out
        self._own = {*files}
        self._made_parents: list[Path] = []  # nearest first
        self._lock: int | None = None

    def open(self) -> bool:
        """Make the folder or take over the one that is there; whether an earlier run left it.

        ValueError if it is in use, or if anything in it is not of a run that makes OUT.
        """
        if not os.path.lexists(self.path):
            self._made_parents = [p for p in self._out.parents if not p.exists()]
            self.path.mkdir(parents=True)
            self._take_lock()
            return False
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: expected a folder of an interrupted run, found none: "
                             f"move it away")
        self._take_lock()
        try:
            return self._take_over()
        except BaseException:
            self.release()
            raise

    def _take_over(self) -> bool:
        """Whether the folder has a journal of a run that makes OUT; nothing else may lie in it."""
        journal = self.path / JOURNAL_FILE
        found = read_json(journal) if journal.is_file() else {}
        ours = found.get("out") == self._out.name
        names, layers = (found.get("files"), found.get("layers")) if ours else ([], {})
        if not isinstance(names, list) or not isinstance(layers, dict) or not all(
                isinstance(entry, dict) for entry in layers.values()):
            raise ValueError(f"{journal}: expected the journal of a run, found other JSON: move "
                             f"the folder away")
        own = {name for name in names if isinstance(name, str)}
        foreign = self._entries(self.path, own if ours else set(), ours)[2]
        if foreign:
            what = "which the interrupted run did not write" if ours else (
                f"but no {JOURNAL_FILE} of a run that makes {self._out.name}")
            raise ValueError(f"{self.path}: expected a folder of an interrupted run, found "
                             f"{_some(foreign)}, {what}: move that away, or choose another OUT")
        self._own |= own
        self.layers = layers
        self._kernels = found.get("kernels")
        return ours

    def require_kernels(self) -> None:
        """ValueError unless the interrupted run worked on the kernels that are active now."""
        now = kernel_names()
        if self._kernels != now:
            raise ValueError(f"{self.path / JOURNAL_FILE}: cannot resume: kernels: expected {now}, "
                             f"found {self._kernels!r:.200}: other kernels round differently (run "
                             f"without resume to start again)")

    def require_sources(self, checkpoint: Checkpoint, layers: Iterable[str]) -> None:
        """ValueError that names the first of these layers whose source is not what was read."""
        if part := self.changed_part(checkpoint, layers):
            raise ValueError(f"{self.path}: cannot resume: {part}")

    def changed_part(self, checkpoint: Checkpoint, layers: Iterable[str]) -> str:
        """Which of these layers is the first whose source is not what was read, in words; or ""."""
        for key in layers:
            if self.layers[key].get("source_sha256") != content_digest(checkpoint, key):
                part = "what is outside the layers" if key == OUTER else f"layer {key}"
                return (f"{part} of {checkpoint.path} changed since the interrupted run read it "
                        f"(run without resume to start again)")
        return ""

    def empty(self) -> None:
        """Delete what runs that make OUT wrote here; the journal last, as it names the rest."""
        files, folders, _ = self._entries(self.path, self._own, True)
        for name in sorted(files, key=lambda name: name.startswith(JOURNAL_FILE)):
            (self.path / name).unlink(missing_ok=True)
        _remove_empty(self.path, folders)
        self.layers = {}

    def delete_finished(self) -> None:
        """Delete OUT of an earlier run. ValueError if others put something in."""
        if not self._out.is_dir() or self._out.is_symlink():
            return
        files, folders, foreign = self._entries(self._out, self._own, True)
        if foreign:
            raise ValueError(f"{self._out}: expected a folder of an earlier run, found "
                             f"{_some(foreign)}, which it did not write: move that away")
        for name in files:
            (self._out / name).unlink()
        _remove_empty(self._out, [*folders, "."])

    def discard(self) -> None:
        """Delete what the run made: its files, and folders in which nothing else lies."""
        if self._lock is not None:
            with contextlib.suppress(OSError):  # no error of deleting replaces the run's own
                self.empty()
                self.path.rmdir()
        for parent in self._made_parents:
            with contextlib.suppress(OSError):  # not made after all, or in use by others
                parent.rmdir()

    def write_journal(self) -> None:
        """Write the journal: before the first other file, and after each layer."""
        values = {"out": self._out.name, "kernels": kernel_names(), "files": sorted(self._own),
                  "layers": self.layers}
        write_file(self.path / JOURNAL_FILE, json.dumps(values, indent=2, allow_nan=False) + "\n")

    def rename(self) -> None:
        """Give the folder the name OUT, durably; the journal goes."""
        for name in self._entries(self.path, self._own, True)[1]:
            sync_folder(self.path / name)
        sync_folder(self.path)
        os.rename(self.path, self._out)
        self._made_parents = []
        (self._out / JOURNAL_FILE).unlink(missing_ok=True)  # not before: a kill would lose it
        sync_folder(self._out)
        sync_folder(self._out.parent)
        self.release()

    def _entries(
        self, top: Path, own: set[str], journal: bool
    ) -> tuple[list[str], list[str], list[str]]:
        """(own files, own folders, all else) below top, as relative names. Links are never own.

        own: names of files. journal: whether the journal is own; what a kill left of writing the
        first one always is.
        """
        names = {*own, JOURNAL_FILE} if journal else own
        whole = names | {name + TEMPORARY for name in {*own, JOURNAL_FILE}}
        parents = {str(PurePosixPath(name).parent) for name in own} - {"."}
        files: list[str] = []
        folders: list[str] = []
        foreign: list[str] = []
        waiting = [top]
        for folder in waiting:
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                name = os.path.relpath(entry.path, top)
                if entry.is_dir(follow_symlinks=False) and name in parents:
                    folders.append(name)
                    waiting.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False) and name in whole:
                    files.append(name)
                else:
                    foreign.append(name)
        return files, folders, foreign

    def _take_lock(self) -> None:
        """One run per OUT.partial; the kernel releases the lock of a killed one."""
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(f"{self.path}: in use by another run") from None
        except OSError:
            pass  # some network file systems cannot lock folders

    def release(self) -> None:
        """Let other runs have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_empty(top: Path, folders: Iterable[str]) -> None:
    for name in folders:
        with contextlib.suppress(OSError):  # not empty: others' files lie there
            (top / name).rmdir()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ---- what a run reads ---------------------------------------------------------------------------

OUTER = "outer"  # the key of the tensors outside the layers


def content_digest(checkpoint: Checkpoint, key: str) -> str:
    """sha256 of every byte that the source has of a layer, or of what is outside the layers.

    FormatError if somebody wrote to a file of it since it was opened: nobody knows what was read.
    """
    source = source_of(checkpoint)
    spec = source.spec
    tensors = spec.outer_tensors() if key == OUTER else spec.layer_tensors(int(key))
    digest = hashlib.sha256()
    for name, shape in tensors:
        array = np.ascontiguousarray(source.tensor(name))
        digest.update(f"{name} {array.dtype} {shape}".encode())
        digest.update(memoryview(array.reshape(-1).view(np.uint8)))
    source.files.require_unchanged()
    return digest.hexdigest()


def source_digest(checkpoint: Checkpoint) -> str:
    """sha256 of every byte that the source has of the model's tensors."""
    keys = (OUTER, *map(str, range(checkpoint.spec.layers)))
    return hashlib.sha256("".join(content_digest(checkpoint, k) for k in keys).encode()).hexdigest()


def source_of(checkpoint: Any) -> Checkpoint:
    """The checkpoint of the files, where `checkpoint` is a view of it."""
    while hasattr(checkpoint, "source"):
        checkpoint = checkpoint.source
    return checkpoint


def add_advice(error: BaseException, text: str) -> None:
    """Append a sentence to an exception's message, where it has one or none."""
    if isinstance(error, OSError) and error.strerror:
        error.strerror += f"; {text}"
    elif not error.args:
        error.args = (text,)
    elif len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}; {text}",)
