# SPDX-License-Identifier: Apache-2.0
"""What the tests of the KV cache share: attention whose keys and values a cache keeps."""

import numpy as np
from blocks import frequencies, geometry, llama, shapes

from singlequant import _C, _reference as reference

PAGE = _C.PAGE_TOKENS
TOLERANCE = 2e-5  # absolute, of values of order 1, as in test_attention.py
BITS = [32, 16, 8, 4]


class Attention:
    """A layer whose q, k and v are random maps of a hidden size of 24, and that adds nothing."""

    def __init__(self, rng, heads=4, kv_heads=2, head_dim=8, window=0, value_scale=1.0):
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        self.geometry = geometry(24, 8, heads, kv_heads, head_dim, window, eps=1e-6,
                                 rotary={"inv_freq": frequencies(head_dim, 100.0)})
        weights = {
            role: rng.normal(size=s).astype(np.float32) / 3 if role in "qkv"
            else np.zeros(s, np.float32) for role, s in shapes(self.geometry).items()
        }
        weights["v"] *= np.float32(value_scale)
        self.parts = llama(self.geometry, {role: (w, None) for role, w in weights.items()})
        self.layer = _C.DecoderLayer(**self.parts)
        self.query = weights["q"]

    def cache(self, sequences=1, capacity=300, bits=32, layers=1, **options):
        return _C.KVCache(layers, sequences, self.kv_heads, self.head_dim, capacity, bits,
                          **options)

    def run(self, hidden, sequence, position, cache, layer=0):
        """What attention gives, [m, heads * head_dim]."""
        return self.layer.forward(hidden.copy(), sequence, position, cache, layer, record=True)["o"]

    def queries(self, hidden, position, turn):
        """Queries [m, heads, head_dim] in float64, after rotary embedding and Hadamard."""
        normed = reference.norm(hidden, ("rms", 1e-6, 0.0, np.ones(24), None))
        q = (normed @ self.query.T.astype(np.float64)).reshape(len(hidden), -1, self.head_dim)
        return [turn(reference.rotary(x, p, self.geometry["rotary"]))
                for x, p in zip(q, position, strict=True)]

    def expected(self, hidden, position, cache, sequence=0):
        """Attention in float64 over what the cache holds."""
        keys, values = (np.swapaxes(x, 0, 1).astype(np.float64)
                        for x in cache.read(0, sequence, int(max(position)) + 1))
        turn = reference.KVCache(1, 1, 1, 2, 1, cache.bits, cache.hadamard).turn
        queries = self.queries(hidden, position, turn)
        return np.stack([
            reference.attention(q, keys, values, p, self.window).ravel()
            for q, p in zip(queries, position, strict=True)
        ])


def tokens(m, first=0, sequence=0):
    return np.full(m, sequence), np.arange(first, first + m)


def hiddens(rng, m):
    return rng.normal(size=(m, 24)).astype(np.float32)
