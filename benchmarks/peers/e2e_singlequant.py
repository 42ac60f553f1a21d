"""Our own engine in end_to_end.py: a packed folder, or a 16-bit one through OpenBLAS."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import singlequant as sq
from singlequant import _C
from singlequant.config import SITES
from singlequant.runtime.layers import architecture_row, flat_positions
from singlequant.runtime.model import _prefill

from .e2e_worker import serve

NARROW = 32  # hidden width of the network that fills a cache


class SingleQuant:
    """KIND is ignored: the folder says what it holds."""

    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        sq.set_num_threads(threads)
        self.model = sq.load(folder)
        self.vocab = self.model.shape.vocab
        self.version = sq.__version__
        self.note = f"kernels {_C.kernels()['active']}"

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self.model.forward(tokens)

    def open(self, count: int, capacity: int) -> None:
        self.session = None  # the old cache goes before the new one comes
        self.session = self.model.new_session(count, capacity)

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        return self.model.logits(_prefill(self.session, list(tokens)))  # cut as generation does

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self.model.logits(self.session.append(list(tokens[:, None])))

    def rewind(self, length: int) -> None:
        self.session.lengths[:] = length

    def fill(self, tokens: np.ndarray) -> None:
        """Keys and values of a network so narrow that a long context costs little."""
        count, length = tokens.shape
        local, positions = flat_positions(np.full(count, length))
        row = architecture_row(self.model.shape) | {"hidden": NARROW, "intermediate": NARROW}
        inner, kv = (row[n] * row["head_dim"] for n in ("heads", "kv_heads"))
        rng = np.random.default_rng(0)

        def matrix(n: int, k: int) -> tuple[np.ndarray, None]:
            return rng.standard_normal((n, k), np.float32) * np.float32(k**-0.5), None

        linears = [matrix(n, NARROW) for n in (inner, kv, kv)] + [matrix(NARROW, inner)]
        linears += [matrix(NARROW, NARROW) for _ in range(3)]
        norm = np.ones(NARROW, np.float32)
        layer = _C.DecoderLayer(row, (norm, norm), linears, [None] * len(SITES))
        for index in range(self.model.shape.layers):
            hidden = matrix(count * length, NARROW)[0]
            layer.forward(hidden, local, positions, self.session._cache, index)
        self.session.lengths[:] = length


if __name__ == "__main__":
    serve(SingleQuant)
