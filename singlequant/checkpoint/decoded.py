# SPDX-License-Identifier: Apache-2.0
"""Tensors under other names than they are stored, some of them decoded when they are viewed."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from .._C import FormatError
from ..tensors import TensorFiles, TensorInfo

KEPT = 2  # decoded tensors that stay in memory though nobody holds them


@dataclass(frozen=True)
class Decoded:
    """A tensor that is made of stored ones when it is read. info: what it is then."""

    info: TensorInfo
    parts: tuple[str, ...]  # names under which the stored ones would be shown
    decode: Callable[..., NDArray[Any]]  # of the parts' views


@dataclass(frozen=True)
class Given:
    """What the quantized tensors of a folder are found in."""

    infos: Mapping[str, TensorInfo]  # by the name that would be shown
    settings: Mapping[str, Any]  # quantization_config
    view: Callable[[str], NDArray[Any]]  # the stored tensor of such a name
    source: str = "config.json"  # where quantization_config stands, for errors
    transposed: frozenset[str] = frozenset()  # weights that the family stores as [inputs, outputs]

    def refuse(self, key: str, expected: str, found: Any) -> FormatError:
        """The error about a key of quantization_config."""
        return FormatError(f"{self.source}: quantization_config.{key}: expected {expected}, found "
                           f"{found!r:.80}")


@dataclass
class Forms:
    """What a folder's quantized tensors stand for."""

    decoded: dict[str, Decoded] = field(default_factory=dict)  # by the name that is shown
    dropped: set[str] = field(default_factory=set)  # read by nobody: scales of activations
    unneeded: set[str] = field(default_factory=set)  # biases of zeros

    def add(self, name: str, entry: Decoded, *dropped: str) -> None:
        """A tensor, and names beside its parts that nobody needs."""
        self.decoded[name] = entry
        self.dropped.update(dropped)


class StoredTensors(TensorFiles):
    """The tensors of files under the names that are shown, quantized ones decoded.

    A decoded tensor is made anew when nobody holds it any longer, unless it is among the last two.
    """

    def __init__(self, files: TensorFiles, names: Mapping[str, str], forms: Forms) -> None:
        """names: the stored name by the one that is shown."""
        self._files, self._names, self._decoded = files, dict(names), forms.decoded
        hidden = forms.dropped.union(*(entry.parts for entry in forms.decoded.values()))
        shown = {name: files.infos[stored] for name, stored in names.items() if name not in hidden}
        super().__init__(shown | {name: entry.info for name, entry in forms.decoded.items()})
        self._alive: weakref.WeakValueDictionary[str, NDArray] = weakref.WeakValueDictionary()
        self._kept: deque[NDArray] = deque(maxlen=KEPT)

    def view(self, name: str) -> NDArray[Any]:
        """Read-only: the mapped tensor, or what is decoded of its parts. KeyError if unknown."""
        entry = self._decoded.get(name)
        if entry is None:
            return self._files.view(self._names[name])
        array = self._alive.get(name)
        if array is None:
            array = entry.decode(*(self._files.view(self._names[part]) for part in entry.parts))
            array.flags.writeable = False
            self._alive[name] = array
        if not any(kept is array for kept in self._kept):
            self._kept.append(array)
        return array

    def pages(self, name: str, page: int = 4096) -> list[memoryview]:
        """Pages of every part that the tensor is made of."""
        entry = self._decoded.get(name)
        parts = (name,) if entry is None else entry.parts
        return [data for part in parts for data in self._files.pages(self._names[part], page)]

    def release(self, name: str) -> None:
        """Give back the memory of the pages of every part that the tensor is made of."""
        entry = self._decoded.get(name)
        for part in (name,) if entry is None else entry.parts:
            self._files.release(self._names[part])

    def require_unchanged(self) -> None:
        """FormatError that names a file which somebody wrote to since it was mapped."""
        self._files.require_unchanged()

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the files."""
        return self._files.bytes_on_disk
