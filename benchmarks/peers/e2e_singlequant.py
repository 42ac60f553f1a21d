"""Our own engine in end_to_end.py: a packed folder, or a 16-bit one through OpenBLAS."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import singlequant as sq
from singlequant import _C
from singlequant.models.spec import ROLES, LayerSpec, layer_sizes
from singlequant.runtime.generate import _prefill
from singlequant.runtime.layers import flat_positions, layer_blocks
from singlequant.weights import Norm

from .e2e_worker import serve

NARROW = 32  # hidden width of the network that fills a cache


class SingleQuant:
    """KIND is ignored: the folder says what it holds."""

    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        sq.set_num_threads(threads)
        self.model = sq.load(folder)
        self.vocab = self.model.spec.vocab
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
        rng = np.random.default_rng(0)

        def matrix(n: int, k: int) -> np.ndarray:
            return rng.standard_normal((n, k), np.float32) * np.float32(k**-0.5)

        spec = narrowed(self.model.spec.layer(0))
        linears = {role: (site.name, matrix(spec.linears[role].n, site.k), None)
                   for site in spec.sites.values() for role in site.roles}
        sites = {name: (site.k, None, 16, 1.0) for name, site in spec.sites.items()}
        norms = {place: Norm(norm.name, np.ones(NARROW, np.float32), None)
                 for place, norm in spec.norms.items()}
        layer = _C.DecoderLayer(**layer_blocks(spec, norms, linears, sites))
        for index in range(self.model.spec.layers):
            hidden = matrix(count * length, NARROW)
            layer.forward(hidden, local, positions, self.session._cache, index)
        self.session.lengths[:] = length


def narrowed(spec: LayerSpec) -> LayerSpec:
    """The same attention in a layer of NARROW channels."""
    mlp = replace(spec.mlp, intermediate=NARROW)
    sizes = layer_sizes(NARROW, spec.attention, mlp)
    linears = {role: replace(linear, n=sizes[ROLES[role].outputs], k=sizes[ROLES[role].inputs])
               for role, linear in spec.linears.items()}
    return replace(spec, hidden=NARROW, mlp=mlp, linears=linears)


if __name__ == "__main__":
    serve(SingleQuant)
