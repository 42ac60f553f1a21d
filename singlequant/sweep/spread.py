# SPDX-License-Identifier: Apache-2.0
"""A sweep's layers on workers: the same bytes as one process gives, at any number of workers.

    windows, in parts        the stream before layer 0, 1, 2, ...      (layer after layer)
    its files                shares of each layer in the noise         (all layers at once)
                             each layer: statistics, rotations, shard  (all layers at once)

The stream is that of the unquantized model, so no layer waits for the rounding of another. Parts of
it can go apart where its sums are exact integers (`in_parts`); BLAS would give other last bits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..distributed import Call, Workers
from ..methods.registry import METHODS
from .bits import TOKENS, Noise, Share, head_noise
from .calibrate import check_windows, embedded
from .layer import quantize_layer
from .prepare import View
from .spread_tasks import (
    Made,
    Stream,
    layer_noise,
    load_parts,
    make_layer,
    pass_part,
    save_part,
)
from .stream import in_parts
from .sweep import Job, Work

MARK = "singlequant-workers"  # the file that says whose a folder of parts is


class Spread:
    """How a sweep has its layers made by workers; one sweep at a time.

    folder: where a folder for the parts of the stream is made, which all workers must see. It lies
    on the file system of the output, and goes when the context ends.
    """

    def __init__(self, workers: Workers, folder: Path, name: str) -> None:
        self._workers, self._parent, self._name = workers, folder, name
        self._parts: list[tuple[str, ...]] = []  # files of the stream before each layer

    def __enter__(self) -> Spread:
        self._made = [p for p in (self._parent, *self._parent.parents) if not p.exists()]
        self._parent.mkdir(parents=True, exist_ok=True)
        _remove_left(self._parent, self._name)
        prefix = f"{self._name}.workers-"
        self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self._parent))
        self._folder.chmod(0o755)
        self._lock = _locked(self._folder / MARK)
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        for parent in self._made:
            with contextlib.suppress(OSError):  # the output lies in it
                parent.rmdir()

    @staticmethod
    def check(jobs: Sequence[Job]) -> None:
        """ValueError for jobs that only one process can do."""
        for job in jobs:
            if METHODS[job.config.method].trains:
                raise ValueError(f"method: {job.config.method} trains weights in the memory of one "
                                 f"process: expected another, or no executor")
            own = job.solve is None and job.observe is None and job.quantize is quantize_layer
            if not own:
                raise ValueError("job: expected the package's own solver and no observer, as "
                                 "workers cannot call those of this process")

    # ---- the stream ------------------------------------------------------------------------------

    def _stream(self, view: View, windows: NDArray[np.int64], bits: int) -> Stream:
        check_windows(view, windows, bits)
        return Stream(view, windows.shape[1], bits, str(self._folder))

    def _begin(self, stream: Stream, windows: NDArray[np.int64]) -> list[str]:
        """The files of the stream before layer 0, one for every worker where parts may go apart."""
        hidden = embedded(stream.view, windows)
        apart = in_parts(stream.view.spec, stream.bits)
        count = min(len(windows), self._workers.count) if apart else 1
        cuts = [len(windows) * i // count * stream.length for i in range(count + 1)]
        return [save_part(stream, "stream-0", hidden[a:b])
                for a, b in zip(cuts, cuts[1:], strict=False)]

    def _run_stream(
        self, stream: Stream, begin: Sequence[str], last: int,
        ready: Callable[[int, tuple[str, ...]], Iterable[Call]],
    ) -> list[tuple[str, ...]]:
        """Carry the parts of `begin` up to layer `last`; the files before each layer.

        ready(index, files): calls that can be made once all parts stand before a layer.
        """
        files = [[""] * len(begin) for _ in range(last + 1)]
        missing = [len(begin)] * (last + 1)

        def arrived(index: int, part: int, path: str) -> list[Call]:
            files[index][part] = path
            missing[index] -= 1
            calls = []
            if index < last:
                calls.append(Call(pass_part, (stream, index, path), (0, index, part),
                                  partial(arrived, index + 1, part)))
            if not missing[index]:
                calls += ready(index, tuple(files[index]))
            return calls

        self._workers.run([call for part, path in enumerate(begin)
                           for call in arrived(0, part, path)])
        return [*map(tuple, files)]

    # ---- the noise -------------------------------------------------------------------------------

    def predict_noise(self, view: View, windows: NDArray[np.int64], bits: int = 32) -> Noise:
        """As `bits.predict_noise`. What it has of the stream serves `make_layers` as well."""
        apart = in_parts(view.spec, bits)
        every = max(1, windows.size // TOKENS)
        if not apart:  # BLAS: few windows alone give other last bits than among all
            windows, every = windows[::every], 1
        stream = self._stream(view, windows, bits)
        shares: dict[int, Mapping[str, Share]] = {}

        def found(index: int, of_layer: Mapping[str, Share]) -> Iterable[Call]:
            shares[index] = of_layer
            return ()

        def ready(index: int, files: tuple[str, ...]) -> Iterator[Call]:
            if index < view.spec.layers:
                yield Call(layer_noise, (stream, index, files, every), (1, index),
                           partial(found, index))

        begin = self._begin(stream, windows)
        parts = self._run_stream(stream, begin, view.spec.layers, ready)
        hidden = load_parts(parts[-1], every, stream.length)
        if apart:
            self._parts = parts
        else:
            self._drop(*parts)
        ordered = {name: share for i in range(view.spec.layers) for name, share in
                   shares[i].items()}
        return Noise(ordered, *head_noise(view, hidden))

    # ---- the layers ------------------------------------------------------------------------------

    def make_layers(
        self, view: View, windows: NDArray[np.int64], works: Sequence[Work], bits: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Have every layer made that a job lacks. A job that fails ends alone, as in one process.
        """
        layers = view.spec.layers
        wanted = [i for i in range(layers) if any(i not in work.finished for work in works)]
        done = layers - len(wanted)
        stream = self._stream(view, windows, bits)

        def made(index: int, asked: Sequence[Work], found: Sequence[Made]) -> Iterable[Call]:
            nonlocal done
            for work, one in zip(asked, found, strict=True):
                work.take(index, one.outcome, one.shard, one.entry)
            done += 1
            if self._parts:
                self._drop(self._parts[index])
            if progress:
                progress(done, layers)
            return ()

        def ready(index: int, files: tuple[str, ...]) -> Iterator[Call]:
            asked = [w for w in works if index not in w.finished and w.outcome.error is None]
            if asked:
                jobs = tuple(replace(work.job, out=None, check=None) for work in asked)
                bits = tuple(work.bits_of(index) for work in asked)
                yield Call(make_layer, (stream, index, files, jobs, bits, asked[0].failures),
                           (1, index), partial(made, index, asked))

        if self._parts:
            self._workers.run([call for i in wanted for call in ready(i, self._parts[i])])
        elif wanted:
            self._run_stream(stream, self._begin(stream, windows), wanted[-1], ready)

    @staticmethod
    def _drop(*parts: Sequence[str]) -> None:
        """Delete files of the stream that nobody needs any more."""
        for of_layer in parts:
            for path in of_layer:
                Path(path).unlink(missing_ok=True)


def _locked(path: Path) -> int | None:
    """Make the mark of a folder that is in use, and hold its lock; None if it is another's."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # some network file systems cannot lock
    return descriptor


def _remove_left(parent: Path, name: str) -> None:
    """Remove the folders of parts that killed runs of this name left behind."""
    for folder in parent.glob(f"{name}.workers-*"):
        if not (folder / MARK).is_file():
            continue
        lock = _locked(folder / MARK)
        if lock is not None:
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
            os.close(lock)
