# SPDX-License-Identifier: Apache-2.0
"""Text files of any size: only what is asked for is read and tokenized."""

from __future__ import annotations

import codecs
import io
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..files import errors_name, is_present

Encode = Callable[[str, bool], NDArray[np.int64]]  # a text, and whether special tokens are added

BYTES_PER_TOKEN = 6  # read at first; more follows while the tokens are too few
MOST_BYTES = 1 << 28  # read at first
PIECE_BYTES = 1 << 20  # of a file that is read whole
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # its marks, which UTF-8 has nowhere
SOME_BYTES = 4096  # in which a text of UTF-16 without a mark shows by its many zeros
MARGIN = 64  # tokens before a cut that the text behind the cut might change


def read_text(path: str | Path) -> str:
    """A whole text file as UTF-8, without its byte-order mark.

    ValueError that names the file when it is empty or not UTF-8.
    """
    with _open(path) as file:
        text = _Reader(path, file).read()
    _require_text(path, text)
    return text


def first_tokens(encode: Encode, path: str | Path, count: int | None = None) -> NDArray[np.int64]:
    """The first tokens [at most count] of a UTF-8 text file, None for all of them.

    They are the tokens that the whole file begins with. No more of it is read than they need, so a
    fault further on stays unseen. A byte-order mark is no part of the text. ValueError that names
    the file when it is empty or not UTF-8.
    """
    with _open(path) as file:
        return _first_tokens(encode, _Reader(path, file), count)


def is_large(path: str | Path, least: int) -> bool:
    """Whether this is a file, and no pipe, of more than `least` bytes."""
    is_present(Path(path))
    found = os.stat(path)
    return stat.S_ISREG(found.st_mode) and found.st_size > least


def drawn_windows(
    encode: Encode, path: str | Path, count: int, window: int, seed: int
) -> NDArray[np.int64]:
    """Windows [count, window] of tokens, from places all over a large UTF-8 text file.

    The file is divided into `count` parts of equal size. Each part gives one window. It begins at
    a place that seed draws, moved to the next line, or to the next word where a line is long.
    Nothing else of the file is read. ValueError that names the file when it is not UTF-8, or has
    fewer tokens than a window.
    """
    size, need = os.stat(path).st_size, BYTES_PER_TOKEN * (window + MARGIN)
    edges = [part * size // count for part in range(count + 1)]
    shares = np.random.default_rng(seed).random(count)
    windows = np.empty((count, window), np.int64)
    with _open(path) as file:
        for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            start = low + int(shares[i] * max(high - low - need, 1))
            windows[i] = _window_at(encode, path, file, start, window)
    return windows


def _open(path: str | Path) -> BinaryIO:
    """The file, unless an unfinished download left something else in its place."""
    is_present(Path(path))
    return open(path, "rb")


class _Reader:
    """Decodes a file piece by piece from where it stands; `ended` says that nothing is left."""

    def __init__(self, path: str | Path, file: BinaryIO, start: int = 0) -> None:
        self.path, self.start = path, start  # in bytes
        self.position = start
        self.ended = False
        self._file = file
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._newlines = io.IncrementalNewlineDecoder(None, translate=True)

    def read(self, count: int = -1) -> str:
        """The text of the next `count` bytes, of all that are left without one.

        All are read piece by piece: what is no text may have no end, as /dev/zero.
        """
        if count < 0:
            pieces = []
            while not self.ended:
                pieces.append(self.read(PIECE_BYTES))
            return "".join(pieces)
        with errors_name(Path(self.path)):
            data = self._file.read(count)
        self.ended = len(data) < count
        if self._is_binary(data):
            raise ValueError(f"{self.path}: expected UTF-8 text, found UTF-16 or binary data")
        if self.position == self.start:
            kept = self._without_opening(data)
            self.position += len(data) - len(kept)
            data = kept
        origin = self.position - len(self._utf8.getstate()[0])  # of a character that was cut
        try:
            text = self._utf8.decode(data, self.ended)
        except UnicodeDecodeError as error:
            found = f"byte 0x{error.object[error.start]:02x} at {origin + error.start}"
            raise ValueError(f"{self.path}: expected UTF-8 text, found {found}") from None
        self.position += len(data)
        return self._newlines.decode(text, self.ended)

    def _is_binary(self, data: bytes) -> bool:
        """Whether zeros or a mark show that a piece is of no text. Zeros at the end are few."""
        if len(data) >= SOME_BYTES and data.count(0) > len(data) / 4:
            return True
        if self.position > self.start:
            return False
        opening = data[:SOME_BYTES]
        return opening.count(0) > len(opening) / 4 or (self.start == 0 and data.startswith(UTF_16))

    def _without_opening(self, data: bytes) -> bytes:
        """The first piece without a byte-order mark, or the rest of a character before it."""
        if self.start == 0:
            return data.removeprefix(codecs.BOM_UTF8)
        return data[:3].lstrip(bytes(range(0x80, 0xC0))) + data[3:]


def _first_tokens(encode: Encode, reader: _Reader, count: int | None) -> NDArray[np.int64]:
    """The first tokens [at most count] from where the reader stands."""
    size = -1 if count is None else min(BYTES_PER_TOKEN * (count + MARGIN), MOST_BYTES)
    text = reader.read(size)
    if reader.start:
        text = _from_a_line(text)
    while not reader.ended:
        if text.strip():
            tokens = encode(text, reader.start == 0)
            if len(tokens) >= count + MARGIN:
                return tokens[:count]
        text += reader.read(reader.position - reader.start)
    if reader.start == 0:
        _require_text(reader.path, text)
    return encode(text, reader.start == 0)[:count]


def _from_a_line(text: str) -> str:
    """Text from its next line on, or from its next word where there is no next line."""
    found = re.search(r"\n", text) or re.search(r"\s", text)
    return text[found.end():] if found else text


def _require_text(path: str | Path, text: str) -> None:
    """ValueError that names the file when nothing but white space is in it."""
    if not text.strip():
        raise ValueError(f"{path}: expected text, found an empty file")


def _window_at(
    encode: Encode, path: str | Path, file: BinaryIO, start: int, window: int
) -> NDArray[np.int64]:
    """The window [window] that begins behind byte `start`, or before it where the file ends."""
    step = BYTES_PER_TOKEN * (window + MARGIN)
    while True:
        file.seek(start)
        tokens = _first_tokens(encode, _Reader(path, file, start), window)
        if len(tokens) == window:
            return tokens
        if start == 0:
            raise ValueError(f"{path}: expected at least one window of {window} tokens, got "
                             f"{len(tokens)}")
        start, step = max(start - step, 0), 2 * step
