# SPDX-License-Identifier: Apache-2.0
"""What a piece of work took: seconds, the largest memory, and why it failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST_OF_A_WORD, MOST_OF_A_LINE = 200, 600  # characters that a message shows


def anonymous_bytes(process: int | str = "self") -> int:
    """Anonymous memory of a process now, this one by default, in bytes; 0 where /proc does not say.

    File-backed pages (the mapped weights) do not count.
    """
    try:
        with open(f"/proc/{process}/status") as file:
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class PeakMemory:
    """Largest anonymous memory of this process while the context is open, in bytes.

    A thread reads it every few milliseconds. `start` is what was there when the context opened.
    """

    INTERVAL_SECONDS = 0.01

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.look()

    def look(self) -> None:
        """Read the memory now: what is there at this moment counts, however late the thread is."""
        self.peak = max(self.peak, anonymous_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(self.INTERVAL_SECONDS):
            self.look()


@dataclass(frozen=True)
class Measured:
    """What a call returned (None if it failed), why it failed (or None), and what it took.

    peak_memory: bytes, all the anonymous memory of the process, not only the call's.
    """

    value: Any
    error: str | None
    seconds: float
    peak_memory: int


def measure(
    function: Callable[..., Any], *arguments: Any, failures: tuple[type[Exception], ...] = ()
) -> Measured:
    """Call a function with a clock and a memory watch. failures: exceptions that are a result."""
    value = error = None
    with PeakMemory() as memory:
        start = time.perf_counter()
        try:
            value = function(*arguments)
        except failures as failure:
            error = reason(failure)
        seconds = time.perf_counter() - start
    return Measured(value, error, seconds, memory.peak)


def reason(error: BaseException) -> str:
    """An exception's message on one line; the name of its type when it has none."""
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    """A message for a terminal: one line, no control characters, and long parts cut.

    Messages repeat names that are in files, and files may come from anywhere.
    """
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    words = (_cut(word, MOST_OF_A_WORD) for word in line.split(" "))
    return _cut(" ".join(words), MOST_OF_A_LINE)


def _cut(text: str, most: int) -> str:
    """Begin and end of a text that is longer than `most` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[: half - 3]}...{text[-half:]}"
