# SPDX-License-Identifier: Apache-2.0
"""Calibration text that the model writes itself.

A model is calibrated best on text like its training text, which is seldom at hand. What the model
writes is such text (LLM-QAT, Liu et al., arXiv 2305.17888).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..checkpoint.chat import DEFAULT, ChatTemplateError, chat_templates, render_chat
from ..checkpoint.folder import Checkpoint
from ..checkpoint.special_tokens import special_tokens
from ..runtime.model import Model

TEMPERATURE, TOP_K, TOP_P = 1.0, 0, 1.0  # measured: docs/calibration.md
BATCH = _C.DENSE_FEW  # sequences at once: up to so many, a 16-bit linear keeps them independent
CACHE_BYTES = 1 << 30  # of keys and values of a batch, or CACHE_SHARE of the model's own bytes
CACHE_SHARE = 0.25
DATED = "{% macro strftime_now(format) %}2025-01-01{% endmacro %}"  # every day the same text
MARK = "\ue000"  # stands for a user's question while a chat template is taken apart


def written_windows(
    checkpoint: Checkpoint, count: int, window: int, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.int64]:
    """Token ids [count, window] that the unquantized model wrote, at temperature TEMPERATURE.

    Windows 0, 2, 4, ... are documents. They begin as the tokenizer begins a text: with BOS, or with
    a token drawn from the vocabulary where it adds none. Windows 1, 3, 5, ... are conversations
    where the folder has a chat template: the template opens the user's turn, the model writes the
    question, and then the answer. Where one ends, the next begins in the same window.
    The same seed gives the same tokens at any number of threads. A window of a model in 16 bits
    does not depend on `count`. The CPU's kernels matter: they round differently.
    progress(tokens done, tokens) is called after each step; an exception in it cancels.
    ValueError names an argument out of range, or the tensor that is not finite.
    """
    checkpoint.require_unquantized()
    limit = checkpoint.spec.max_position_embeddings
    for name, value, least, most in (("count", count, 1, None), ("window", window, 1, limit),
                                     ("seed", seed, 0, None)):
        if value < least or most is not None and value > most:
            upto = "" if most is None else f" and at most {most}, the model's maximum"
            raise ValueError(f"{name}: expected at least {least}{upto}, got {value}")
    model = Model(checkpoint)
    openings = _openings(model)
    windows = np.empty((count, window), np.int64)
    batch = _batch(checkpoint, window)
    for begin in range(0, count, batch):
        part = windows[begin : begin + batch]
        sequences = [_Sequence(openings, seed, begin + i) for i in range(len(part))]
        try:
            _write(model, sequences, part, lambda done, base=begin * window:
                   progress and progress(base + done, windows.size))
        except ValueError:
            for layer in range(checkpoint.spec.layers):  # logits that are not finite come of these
                checkpoint.require_finite(layer)
            raise
    return windows


def _batch(checkpoint: Checkpoint, window: int) -> int:
    """How many sequences of `window` tokens are written at once."""
    spec = checkpoint.spec
    width = 2 * spec.attention.kv_heads * spec.attention.head_dim
    cache = spec.layers * window * width * np.dtype(np.float32).itemsize
    room = max(CACHE_BYTES, int(CACHE_SHARE * checkpoint.bytes_on_disk))
    return max(1, min(BATCH, room // cache))


def _write(
    model: Model, sequences: list[_Sequence], windows: NDArray[np.int64],
    progress: Callable[[int], None],
) -> None:
    """Fill windows [count, window], a sequence each, one token of all of them in each step."""
    count, window = windows.shape
    session = model.new_session(count, window)
    hidden = np.empty((count, 0), np.float32)
    for step in range(window):
        free = [i for i, sequence in enumerate(sequences) if not sequence.forced]
        drawn = {}
        if free:
            uniform = [sequences[i].random.random() for i in free]
            tokens = _C.sample_rows(model.logits(hidden[free]), TEMPERATURE, TOP_K, TOP_P, uniform)
            drawn = dict(zip(free, tokens.tolist(), strict=True))
        for i, sequence in enumerate(sequences):
            windows[i, step] = sequence.next(drawn.get(i))
        if step + 1 < window:
            hidden = session.append(list(windows[:, step : step + 1]))
        progress((step + 1) * count)


@dataclass(frozen=True)
class _Openings:
    """What the model does not write itself: how documents and conversations begin.

    begin: token ids before a document. first: ids [any number] that one is drawn from when there
    are none. question, answer: what opens the user's turn, and what stands between it and the
    model's; empty without a chat template. stop: ids that end a document or a turn.
    """

    begin: list[int]
    first: NDArray[np.int64]
    question: list[int]
    answer: list[int]
    stop: frozenset[int]


class _Sequence:
    """One window being written: what must come next, and its stream of random numbers."""

    def __init__(self, openings: _Openings, seed: int, index: int) -> None:
        self.forced: deque[int] = deque()
        self.random = np.random.default_rng((seed, index))
        self._openings = openings
        self._chat = index % 2 == 1 and bool(openings.question)
        self._open()

    def next(self, drawn: int | None) -> int:
        """The next token: the one drawn, or a forced one without it."""
        if drawn is None:
            return self.forced.popleft()
        if drawn in self._openings.stop:
            self._end(drawn)
        return drawn

    def _open(self) -> None:
        """A new conversation or document."""
        self._asks = self._chat
        if self._chat:
            self.forced.extend(self._openings.question)
        elif self._openings.begin:
            self.forced.extend(self._openings.begin)
        else:
            self.forced.append(int(self.random.choice(self._openings.first)))

    def _end(self, token: int) -> None:
        """Behind a stop token: the answer to a question, or something new."""
        answer = self._openings.answer
        if self._asks and token == answer[0]:
            self._asks = False
            self.forced.extend(answer[1:])
        else:
            self._open()


def _openings(model: Model) -> _Openings:
    """How the model's documents and conversations begin."""
    checkpoint = model.checkpoint
    question, answer = _turns(checkpoint)
    special = set(special_tokens(checkpoint).named.values())
    known = checkpoint.tokenizer.get_vocab(with_added_tokens=True)
    added = checkpoint.tokenizer.get_added_tokens_decoder()
    first = sorted(i for text, i in known.items()
                   if i < checkpoint.spec.vocab and i not in added and text not in special)
    return _Openings(_begin(checkpoint), np.array(first, np.int64), question, answer,
                     frozenset(model.stop_tokens))


def _begin(checkpoint: Checkpoint) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain = checkpoint.encode(MARK, special=False).tolist()
    whole = checkpoint.encode(MARK).tolist()
    places = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(places, 0)]


def _turns(checkpoint: Checkpoint) -> tuple[list[int], list[int]]:
    """Token ids before a user's question and behind it; none without a template that asks one."""
    template = chat_templates(checkpoint)[0].get(DEFAULT)
    if template is None:
        return [], []
    try:
        text = render_chat(checkpoint, [{"role": "user", "content": MARK}],
                           chat_template=DATED + template)
    except ChatTemplateError:  # it wants other conversations
        return [], []
    before, mark, behind = text.partition(MARK)
    parts = [checkpoint.encode(part, special=False).tolist() for part in (before, behind)]
    return (parts[0], parts[1]) if mark and all(parts) else ([], [])
