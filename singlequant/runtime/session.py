# SPDX-License-Identifier: Apache-2.0
"""Sequences being decoded, and the KV cache behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..rows import token_ids
from .layers import flat_positions

if TYPE_CHECKING:
    from .model import Model


class Session:
    """Sequences being decoded: their KV cache and how many tokens each holds.

    The cache grows page by page with what is appended; `end` gives a sequence's pages back, and
    another one may start in its place. sliding: layers with a window give back the pages that it
    has left, so that a sequence of any length takes no more memory; its `lengths` must then only
    grow. One thread at a time.
    """

    def __init__(
        self, model: Model, sequences: int, capacity: int, limit: int = 0, sliding: bool = False
    ) -> None:
        self.model = model
        self.capacity = capacity
        self.lengths = np.zeros(sequences, np.int64)
        self._cache = model.new_cache(sequences, capacity, limit)
        kinds = (model.spec.layer(i).attention for i in range(model.spec.layers))
        self._windows = [(i, a.window) for i, a in enumerate(kinds) if a.window and sliding]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in memory."""
        return self._cache.nbytes

    def end(self, sequence: int) -> None:
        """Forget a sequence and free its pages. ValueError when there is no such sequence."""
        self._cache.release(sequence)
        self.lengths[sequence] = 0

    def append(
        self, tokens: Sequence[NDArray[np.int64]], sequences: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Feed tokens[i] to sequence sequences[i]; final hidden states [total, hidden] in order.

        The number of tokens may differ from sequence to sequence. ValueError past the capacity or
        for a sequence that does not exist or stands twice, MemoryError past the cache's limit: the
        session is as it was then. So it is when a signal's handler raises amid the call, but for
        pages, which it keeps.
        """
        if len(tokens) == 0:
            raise ValueError("tokens: expected at least one sequence's, got none")
        chosen = np.arange(len(tokens)) if sequences is None else np.asarray(sequences)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise ValueError(f"sequences: expected a list of integers, got {sequences!r}")
        if len(chosen) != len(tokens):
            raise ValueError(f"sequences: expected {len(tokens)}, one for each of tokens, "
                             f"got {len(chosen)}")
        places = chosen.tolist()
        if not 0 <= min(places) <= max(places) < len(self.lengths):
            raise ValueError(f"sequences: expected 0 to {len(self.lengths) - 1}, got {places}")
        if len(set(places)) < len(places):
            raise ValueError(f"sequences: expected each once, got {places}")
        tokens = [token_ids(t, f"tokens {i}") for i, t in enumerate(tokens)]
        lengths = np.array([len(t) for t in tokens], np.int64)
        starts = self.lengths[chosen]
        if (longest := int((starts + lengths).max())) > self.capacity:
            raise ValueError(
                f"tokens: expected at most {self.capacity} in a sequence, got {longest}"
            )
        local, position = flat_positions(lengths, starts)
        hidden = self.model.outer.embed(np.concatenate(tokens), position)
        self.model._decoder.forward(hidden, chosen[local], position, self._cache)
        self.model.warn_of_clamped(self._cache)
        self.model.warn_of_faint(self._cache, places[int((starts + lengths).argmax())], longest)
        self.lengths[chosen] = starts + lengths
        if self._windows:
            self._slide(chosen, starts)
        return self.model.outer.finish(hidden)

    def _slide(self, sequences: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        """Give back pages outside of the windows, of sequences that came to another page."""
        pages = self.lengths[sequences] // _C.PAGE_TOKENS != starts // _C.PAGE_TOKENS
        for sequence in sequences[pages].tolist():
            for layer, window in self._windows:
                first = int(self.lengths[sequence]) - window + 1  # that the next token sees
                if first > 0:
                    self._cache.forget(layer, sequence, first)
