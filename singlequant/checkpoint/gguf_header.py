# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: metadata, and where each tensor lies.

The gguf package has a reader of its own, which follows counts that lie without end. Here every
count and offset is checked against the bytes of the file before it is used.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .._C import FormatError
from ..files import MAX_LISTING_BYTES
from ..tensors import TensorInfo

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}  # metadata type -> its struct code
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4
PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}


@dataclass(frozen=True)
class Stored:
    """A tensor of the file. shape: of its values, the last along a row. kind: ggml's number."""

    info: TensorInfo  # quantized ones are U8, their rows bytes
    shape: tuple[int, ...]
    kind: int


@dataclass(frozen=True)
class Header:
    """What a file says before its data."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read_gguf_header(path: Path, sizes: dict[int, tuple[int, int]]) -> Header:
    """The header of a file. sizes: (values, bytes) of a block by ggml's number of a type.

    FormatError if a count, a length or an offset is not within the file.
    """
    if not path.stat().st_size:
        raise FormatError(f"{path}: expected a GGUF file, found an empty one")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(path, data)
        if data[:4] != MAGIC:
            raise FormatError(f"{path}: expected a folder or a GGUF file, found {data[:4]!r} at "
                              "its beginning")
        reader.at = 4
        version = reader.number("I")
        if version not in VERSIONS:
            raise FormatError(f"{path}: GGUF version: expected "
                              f"{' or '.join(map(str, VERSIONS))}, found {version}")
        tensors, entries = reader.count(24), reader.count(13)  # the least bytes of one
        metadata = reader.metadata(entries)
        found = {}
        for _ in range(tensors):
            name, entry = reader.tensor(sizes)
            if name in found:
                raise FormatError(f"{path}: {name}: the tensor stands twice")
            found[name] = entry
        start = reader.data_start(metadata.get("general.alignment", 32))
    placed = {name: _placed(path, name, entry, start, reader.size) for name, entry in found.items()}
    return Header(metadata, placed)


def _placed(path: Path, name: str, entry: Stored, start: int, size: int) -> Stored:
    """The tensor with its place in the file instead of in the data."""
    info = entry.info
    begin = start + info.begin
    if begin + info.nbytes > size:
        raise FormatError(f"{path}: {name}: truncated: the tensor ends at byte "
                          f"{begin + info.nbytes}, the file has {size}")
    return Stored(TensorInfo(path, info.dtype, info.shape, begin, info.nbytes), entry.shape,
                  entry.kind)


class _Reader:
    """Little-endian values one after the other."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.size - self.at:
            raise FormatError(f"{self.path}: truncated: {count} bytes should follow byte "
                              f"{self.at}, the file has {self.size}")
        self.at += count
        if self.at > MAX_LISTING_BYTES:
            raise FormatError(f"{self.path}: expected a header of at most {MAX_LISTING_BYTES} "
                              f"bytes, found {self.at}")
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        """One number of a struct code."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, least: int) -> int:
        """A count of entries that take at least so many bytes each."""
        count = self.number("Q")
        if count * least > self.size - self.at:
            raise FormatError(f"{self.path}: truncated: {count} entries should follow byte "
                              f"{self.at}, the file has {self.size}")
        return count

    def text(self) -> str:
        """A string with its length in front; bytes that are no UTF-8 are replaced."""
        return self.take(self.count(1)).decode("utf-8", "replace")

    def metadata(self, entries: int) -> dict[str, Any]:
        """The entries by key."""
        found: dict[str, Any] = {}
        for _ in range(entries):
            key = self.text()
            if key in found:
                raise FormatError(f"{self.path}: {key}: the key stands twice")
            found[key] = self.value(key, self.number("I"))
        return found

    def value(self, key: str, kind: int) -> Any:
        """A number, a text, or a list of either."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind = self.number("I")
            if kind == STRING:
                return [self.text() for _ in range(self.count(8))]
            code = self._code(key, kind)
            count = self.count(struct.calcsize(f"<{code}"))
            return list(struct.unpack(f"<{count}{code}",
                                      self.take(count * struct.calcsize(f"<{code}"))))
        return self.number(self._code(key, kind))

    def _code(self, key: str, kind: int) -> str:
        if kind not in SCALARS:
            raise FormatError(f"{self.path}: {key}: expected one of GGUF's types, found {kind}")
        return SCALARS[kind]

    def tensor(self, sizes: dict[int, tuple[int, int]]) -> tuple[str, Stored]:
        """(name, tensor), its begin counted from the beginning of the data."""
        name, dimensions = self.text(), self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise FormatError(f"{self.path}: {name}: expected at most {MOST_DIMENSIONS} "
                              f"dimensions, found {dimensions}")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        kind, begin = self.number("I"), self.number("Q")
        block, nbytes = sizes.get(kind, (0, 0))
        row = shape[-1] if shape else 1
        if not block or row % block:
            raise FormatError(f"{self.path}: {name}: expected a type of the gguf package and whole "
                              f"blocks in a row, found type {kind} and rows of {row}")
        stored, dtype = shape, PLAIN.get(kind)
        if dtype is None:
            stored, dtype = (*shape[:-1], row // block * nbytes), "U8"
        total = prod(shape) // block * nbytes
        return name, Stored(TensorInfo(self.path, dtype, stored, begin, total), shape, kind)

    def data_start(self, alignment: Any) -> int:
        """Where the data begin: behind the header, aligned."""
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise FormatError(f"{self.path}: general.alignment: expected a power of two, found "
                              f"{alignment!r:.80}")
        return -(-self.at // alignment) * alignment
