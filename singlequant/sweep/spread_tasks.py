# SPDX-License-Identifier: Apache-2.0
"""What a worker does for a sweep that is spread: each function is one call of `spread.py`.

Calls take and leave the residual stream in files of a folder that all workers see. A call's files
have names that no other call gives, so that a call that is made twice changes nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..distributed import worker_name
from ..export.writer import write_shard
from ..statistics import LayerStatistics
from ..weights import QuantizedLayer
from .bits import Share, layer_shares, noise_layer
from .calibrate import SAMPLE_TOKENS, layers_statistics, pass_layer
from .prepare import View
from .sweep import Job, Outcome, Work, sweep_layer


@dataclass(frozen=True)
class Stream:
    """What all calls of a run share: the model, the windows' length, how layers are run, where."""

    view: View
    length: int  # tokens of a window
    bits: int  # of the layers that carry the tokens
    folder: str


@dataclass(frozen=True)
class Made:
    """What a worker made of a layer for one job: a shard, its journal entry, and what it took."""

    shard: str | None
    entry: Mapping[str, object]
    outcome: Outcome


def new_file(folder: str, what: str) -> Path:
    """A name that nobody else chooses."""
    return Path(folder) / f"{what}-{worker_name()}-{secrets.token_hex(4)}"


def save_part(stream: Stream, what: str, hidden: NDArray[np.float32]) -> str:
    """Write rows of the residual stream; the file's name."""
    path = new_file(stream.folder, what).with_suffix(".npy")
    np.save(path, hidden)
    return str(path)


def load_parts(parts: Sequence[str], every: int = 1, length: int = 1) -> NDArray[np.float32]:
    """The rows of several files, one behind the other; of every so many windows of a length."""
    mapped = [np.load(part, mmap_mode="r") for part in parts]
    if every == 1:
        return np.concatenate(mapped)
    windows = [m.reshape(-1, length, m.shape[1]) for m in mapped]
    firsts = np.cumsum([0, *map(len, windows)])
    kept = [w[-first % every :: every] for w, first in zip(windows, firsts, strict=False)]
    return np.concatenate(kept).reshape(-1, mapped[0].shape[1])


def pass_part(stream: Stream, index: int, part: str) -> str:
    """Run some windows through a layer; the file of what is behind it."""
    hidden = load_parts([part])
    pass_layer(stream.view, index, hidden, stream.length, stream.bits, record=False)
    return save_part(stream, f"stream-{index + 1}", hidden)


def layer_noise(
    stream: Stream, index: int, before: Sequence[str], every: int
) -> dict[str, Share]:
    """The shares of a layer in the noise, as `predict_noise` finds them."""
    entry = load_parts(before, every, stream.length)
    passed = pass_layer(stream.view, index, entry.copy(), stream.length, stream.bits)
    return dict(layer_shares(stream.view, noise_layer(stream.view, passed, entry)))


class _Shard:
    """Takes the place of a ModelWriter: the layer's shard alone, under a name of its own."""

    def __init__(self, stream: Stream, config) -> None:
        self._stream, self._config = stream, config
        self.path: Path | None = None
        self.entry: dict[str, object] = {}

    def write_layer(self, layer: QuantizedLayer) -> None:
        path = new_file(self._stream.folder, f"layer-{layer.index}").with_suffix(".safetensors")
        self.entry = write_shard(path, layer, self._stream.view, self._config)
        self.path = path


def make_layer(
    stream: Stream, index: int, before: Sequence[str], jobs: Sequence[Job],
    bits: Sequence[Mapping[str, int]], failures: tuple[type[Exception], ...],
) -> list[Made]:
    """Calibrate, solve, quantize and pack one layer for every job that has none yet."""
    inputs = any(job.config.weights == "gptq" for job in jobs)
    works = [Work(job, stream.view, failures) for job in jobs]
    shards = [_Shard(stream, job.config) for job in jobs]
    for work, shard, more in zip(works, shards, bits, strict=True):
        work.bits, work.writer = dict(more), shard
    sweep_layer(stream.view, _statistics(stream, index, before, inputs), works)
    return [Made(None if shard.path is None else str(shard.path), shard.entry, work.outcome)
            for work, shard in zip(works, shards, strict=True)]


def _statistics(
    stream: Stream, index: int, before: Sequence[str], keep_inputs: bool
) -> Iterator[LayerStatistics]:
    """The statistics of one layer, of all windows in their order."""
    def passed():
        yield pass_layer(stream.view, index, load_parts(before), stream.length, stream.bits)

    return layers_statistics(stream.view, passed(), SAMPLE_TOKENS, keep_inputs)
