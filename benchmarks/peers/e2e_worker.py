"""What the engines of end_to_end.py share: their interface, and the requests that are timed.

An engine runs in a process of its own, in the Python that has its packages; this file needs NumPy
only.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Protocol

import numpy as np

from . import serving

WARM_UP = 4  # tokens of the short prompts before the first that are timed


class Engine(Protocol):
    """One loaded model. Tokens are [count, length]; every call ends with the logits in memory.

    `rewind` before `prefill` or `decode` is not timed; the rest is, from token ids to the float
    logits of the last token of each sequence [count, vocab].
    """

    version: str
    vocab: int

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """[count, length, vocab] float32, for the comparison of engines."""

    def open(self, count: int, capacity: int) -> None:
        """Make room for the cache of so many sequences; all sequences are empty."""

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Feed whole prompts to empty sequences 0 .. count - 1."""

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Feed one token [count] to each sequence."""

    def rewind(self, length: int) -> None:
        """Forget the tokens behind the first `length` of every sequence."""

    def fill(self, tokens: np.ndarray) -> None:
        """Leave sequences that hold as many tokens as these prompts; their values do not matter."""


def random_tokens(count: int, length: int, vocab: int) -> np.ndarray:
    """The same ids [count, length] in every engine."""
    return np.random.default_rng((count, length)).integers(0, vocab, (count, length))


class Timer:
    """Runs the requests of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.opened: tuple | None = None  # what the caches hold: (phase, count, length)

    def logits(self, count: int, length: int, file: str) -> dict:
        """Logits of random windows, written to a .npy file."""
        found = self.engine.logits(random_tokens(count, length, self.engine.vocab))
        np.save(file, found.reshape(count, length, -1).astype(np.float32))
        self.opened = None
        return {}

    def close(self) -> dict:
        """Give the caches' memory back."""
        self.engine.open(1, 1)
        self.opened = None
        return {}

    def prefill(self, batch: int, length: int) -> dict:
        """Seconds of one prompt of this length in each of so many sequences."""
        tokens = random_tokens(batch, length, self.engine.vocab)
        if self.opened != ("prefill", batch, length):
            self.engine.open(batch, length)
            self.engine.prefill(tokens[:, :WARM_UP])
            self.opened = ("prefill", batch, length)
        self.engine.rewind(0)
        start = time.perf_counter()
        logits = self.engine.prefill(tokens)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": batch * length, "finite": check(logits, batch)}

    def decode(self, batch: int, context: int, steps: int) -> dict:
        """Seconds of so many steps of one token per sequence, behind a context."""
        tokens = random_tokens(steps, batch, self.engine.vocab)
        if self.opened != ("decode", batch, context, steps):
            self.engine.open(batch, context + steps)
            self.engine.fill(random_tokens(batch, context, self.engine.vocab))
            self.engine.decode(tokens[0])
            self.opened = ("decode", batch, context, steps)
        self.engine.rewind(context)
        start = time.perf_counter()
        for row in tokens:
            logits = self.engine.decode(row)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": batch * steps, "finite": check(logits, batch)}


def check(logits: np.ndarray, batch: int) -> bool:
    """True when there is a finite row for each sequence."""
    return logits.shape[0] == batch and bool(np.isfinite(logits).all())


def serve(load) -> None:
    """Answer requests until standard input ends. load(folder, kind, threads) makes the engine.

    The command line is FOLDER KIND CPUS: CPUS, comma separated, are those to run on.
    """
    folder, kind, cpus = sys.argv[1:]

    def hello(timer: Timer) -> dict:
        return {"version": timer.engine.version, "note": getattr(timer.engine, "note", "")}

    serving.serve(lambda: Timer(load(Path(folder), kind, len(cpus.split(",")))), hello, cpus)
