"""Our own engine in end_to_end.py: a packed folder, or a 16-bit one through OpenBLAS."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from e2e_worker import serve

import singlequant as sq
from singlequant import _C
from singlequant.runtime.layers import flat_positions, layer_blocks
from singlequant.runtime.model import _prefill

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
        shape = replace(self.model.shape, hidden=NARROW, intermediate=NARROW)
        inner, kv = (heads * shape.head_dim for heads in (shape.heads, shape.kv_heads))
        rng = np.random.default_rng(0)

        def matrix(n: int, k: int) -> np.ndarray:
            return rng.standard_normal((n, k), np.float32) * np.float32(k**-0.5)

        widths = {"qkv": NARROW, "o": inner, "gate_up": NARROW, "down": NARROW}
        outputs = {"q": inner, "k": kv, "v": kv}
        linears = {
            role: (site, matrix(outputs.get(role, NARROW), widths[site]), None)
            for site, roles in self.model.checkpoint.architecture.sites.items()
            for role in roles
        }
        norm = np.ones(NARROW, np.float32)
        sites = {site: (k, None, 16, 1.0) for site, k in widths.items()}
        layer = _C.DecoderLayer(**layer_blocks(shape, (norm, norm), linears, sites))
        for index in range(self.model.shape.layers):
            hidden = matrix(count * length, NARROW)
            layer.forward(hidden, local, positions, self.session._cache, index)
        self.session.lengths[:] = length


if __name__ == "__main__":
    serve(SingleQuant)
