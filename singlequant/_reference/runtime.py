# SPDX-License-Identifier: Apache-2.0
"""Linears, the decoder, the KV cache, sampling and likelihoods in plain NumPy."""

import math

import numpy as np

from .quantize import dequantize, quantize, sum_of_lanes, unpack
from .transform import hadamard_matrix

F32 = np.float32


def packed_linear(x, words, scales, group=0, bits=4, clip=1.0, high=0):
    """The linear with exact integer sums and the kernels' float32 operations after them (4 and 8
    bits), or in float64 (16 bits). Takes the words and scales a PackedWeight was made of. The first
    `high` inputs have 8-bit codes over their own unclipped range; the two parts are added last."""
    x = np.asarray(x, F32)
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    codes_w = unpack(words, k).astype(np.int64)
    n = len(codes_w)
    g = group or k
    scales = np.asarray(scales, F32).reshape(n, k // g)
    if bits == 16:
        w = dequantize(codes_w.astype(np.int8), scales).astype(np.float64)
        return (rows.astype(np.float64) @ w.T).reshape(*x.shape[:-1], n)
    y = np.zeros((len(rows), n), F32)
    for begin, end, width, ratio in ((high, k, bits, clip), (0, high, 8, 1.0)):
        if begin == end:
            continue
        codes, scale, _ = quantize(rows[:, begin:end], width, clip=ratio)
        total = np.zeros((len(rows), n), F32)
        for first in range(begin, end, group or k):
            part = slice(first, min(first + g, end))
            sums = codes[:, first - begin : part.stop - begin].astype(np.int64) @ codes_w[:, part].T
            total += scales[:, first // g] * sums.astype(F32)
        y += scale * total
    return y.reshape(*x.shape[:-1], n)


def gemm_f32(a, b):
    return np.asarray(a, np.float64) @ np.asarray(b, np.float64)


def rms_norm(x, weight, eps):
    x = np.asarray(x, F32)
    wide = x.astype(np.float64)
    inv_rms = (1 / np.sqrt(sum_of_lanes(wide * wide) / x.shape[-1] + float(F32(eps)))).astype(F32)
    return x * np.expand_dims(inv_rms, -1) * np.asarray(weight, F32)


def silu_mul(gate, up):
    return activate("silu", gate) * np.asarray(up, np.float64)


def softmax(x, scale=1.0):
    x = np.asarray(x, np.float64) * float(F32(scale))
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def linear_dense(x, weight):
    return np.asarray(x, np.float64) @ np.asarray(weight).astype(np.float64).T


def gather_rows(table, index):
    return np.asarray(table)[np.asarray(index)].astype(np.float32)


def norm(x, rule):
    """Rows of x in float64; rule: (kind, eps, offset, weight, bias or None), or None: x itself."""
    if rule is None:
        return x
    kind, eps, offset, weight, bias = rule
    x = np.asarray(x, np.float64)
    x = x - x.mean(axis=-1, keepdims=True) if kind == "layer" else x
    scale = np.float32(offset) + np.asarray(weight, np.float32)
    y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale
    return y if bias is None else y + np.asarray(bias)


def rotary(x, position, rule):
    """x [heads, head_dim] at one position; rule: (inv_freq [dim / 2], scale), or None: x itself.

    Channels i and i + dim / 2 turn by position * inv_freq[i]; those from dim on stay. The angle is
    rounded to float32 as in the models; all else is float64.
    """
    if rule is None:
        return x
    inv_freq, scale = rule
    angle = (np.float32(position) * np.asarray(inv_freq, np.float32)).astype(np.float64)
    c, s = np.cos(angle) * scale, np.sin(angle) * scale
    half = len(angle)
    first, second, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    return np.concatenate([first * c - second * s, second * c + first * s, rest], axis=-1)


def attention(q, keys, values, position, window=0, scale=None):
    """One token: q [heads, d] against keys and values [kv_heads, positions, d]; scale of the
    scores, 1 / sqrt(d) by default."""
    group = len(q) // len(keys)
    start = max(0, position - window + 1) if window else 0
    scale = 1 / np.sqrt(q.shape[1]) if scale is None else scale
    out = np.empty_like(q)
    for head, query in enumerate(q):
        k = keys[head // group][start : position + 1]
        v = values[head // group][start : position + 1]
        out[head] = softmax(k @ query * scale) @ v
    return out


def activate(kind, x):
    """The activations of an MLP, in float64."""
    x = np.asarray(x, np.float64)
    with np.errstate(over="ignore"):
        if kind == "silu":
            return x / (1 + np.exp(-x))
        if kind == "gelu":
            return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        if kind == "gelu_tanh":
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return np.maximum(x, 0) ** {"relu": 1, "relu2": 2}[kind]


class KVCache:
    """keys and values [layers, sequences, kv_heads, capacity, head_dim], rounded when stored."""

    def __init__(
        self, layers, sequences, kv_heads, head_dim, capacity, bits=32, hadamard=True, limit=0
    ):
        self.layers, self.sequences, self.capacity = layers, sequences, capacity
        self.bits, self.hadamard = bits, hadamard and bits < 16
        self.keys = np.zeros((layers, sequences, kv_heads, capacity, head_dim))
        self.values = np.zeros_like(self.keys)

    def turn(self, x):
        """x [heads, head_dim] as the cache's Hadamard turns it."""
        return x @ hadamard_matrix(x.shape[-1]).T if self.hadamard else x

    def store(self, layer, sequence, position, key, value):
        """key, already turned, and value [kv_heads, head_dim]."""
        where = layer, sequence, slice(None), position
        self.keys[where], self.values[where] = kv_round(key, self.bits), kv_round(value, self.bits)

    def release(self, sequence):
        self.keys[:, sequence] = self.values[:, sequence] = 0


class DecoderLayer:
    """The layer of the core block by block, with its constructor.

    A weight is an array or, for tests of packed layers, a function of its site's value. Rotations,
    bits and clips of sites are not looked at: such a function rotates and quantizes as it likes.
    """

    def __init__(
        self, hidden, sites, attention, mlp, norms, parallel=False, residual_scale=1.0
    ):
        self.sites, self.attention, self.mlp, self.norms = sites, attention, mlp, norms
        self.parallel, self.residual_scale = parallel, residual_scale
        self.inputs = {}

    def linear(self, linear, x):
        site, weight, bias = linear
        self.inputs[site] = x.copy()
        y = weight(x) if callable(weight) else linear_dense(x, weight)
        return np.asarray(y, np.float64) + (0 if bias is None else np.asarray(bias))

    def mix(self, x, sequence, position, cache, layer):
        """The attention block of x [m, h]."""
        a, m, d = self.attention, len(x), self.attention["head_dim"]
        q, k, v = (self.linear(a[role], x).reshape(m, -1, d) for role in ("q", "k", "v"))
        q, k = norm(q, a.get("q_norm")), norm(k, a.get("k_norm"))
        for t in range(m):
            turned = cache.turn(rotary(k[t], position[t], a["rotary"]))
            cache.store(layer, sequence[t], position[t], turned, v[t])
        mixed = np.empty((m, a["heads"] * d))
        for t in range(m):
            query, of = cache.turn(rotary(q[t], position[t], a["rotary"])), (layer, sequence[t])
            mixed[t] = attention(query, cache.keys[of], cache.values[of], position[t],
                                 a["window"], a["scale"]).ravel()
        return self.linear(a["o"], mixed)

    def feed(self, x):
        """The MLP block of x [m, h]."""
        mlp = self.mlp
        if mlp["gate"] is None:
            inner = activate(mlp["activation"], self.linear(mlp["up"], x))
        else:
            inner = activate(mlp["activation"], self.linear(mlp["gate"], x))
            inner = inner * self.linear(mlp["up"], x)
        return self.linear(mlp["down"], inner)

    def forward(self, hidden, sequence, position, cache, layer, record=False):
        """hidden [m, h] float64, updated in place."""
        norms, before = self.norms, hidden.copy()
        x = norm(before, norms.get("before_attention"))
        branch = norm(self.mix(x, sequence, position, cache, layer), norms.get("after_attention"))
        hidden += self.residual_scale * branch
        if not self.parallel:
            x = norm(hidden, norms.get("before_mlp"))
        elif norms.get("before_mlp"):
            x = norm(before, norms["before_mlp"])
        hidden += self.residual_scale * norm(self.feed(x), norms.get("after_mlp"))
        return {site: self.inputs[site] for site in self.sites} if record else None


def distribution(logits, temperature, top_k, top_p):
    """(tokens in order of the walk, their probabilities) that sample draws from."""
    logits = np.asarray(logits, np.float32).astype(np.float64)
    p = softmax(logits / np.float64(np.float32(temperature)))
    order = np.argsort(-p, kind="stable")
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        mass = np.cumsum(p[order])
        order = order[: np.searchsorted(mass, np.float64(np.float32(top_p)) * mass[-1]) + 1]
    return order, p[order] / p[order].sum()


def sample(logits, temperature, top_k, top_p, uniform):
    if temperature == 0:
        return int(np.argmax(logits))
    order, p = distribution(logits, temperature, top_k, top_p)
    return int(order[min(np.searchsorted(np.cumsum(p), uniform, side="right"), len(order) - 1)])


def log_softmax(logits):
    x = np.asarray(logits, np.float32).astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def negative_log_likelihood(logits, target):
    return -log_softmax(logits)[np.arange(len(target)), target]


def kl_divergence(p, q):
    log_p, log_q = log_softmax(p), log_softmax(q)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    return kl, np.argmax(p, axis=-1) == np.argmax(q, axis=-1)


def float16_toward(x, direction):
    """x [m] in float16, rounded to nearest, then moved on to the next one where that is short of x
    in direction (-1: down, 1: up). Finite: at most 65504."""
    largest = np.float32(65504)
    half = np.clip(x, -largest, largest).astype(np.float16)
    short = (half.astype(np.float32) - x) * direction < 0
    with np.errstate(over="ignore"):
        moved = np.nextafter(half, np.float16(direction * np.inf))
    return np.where(short & np.isfinite(moved), moved, half)


def kv_quantize(x, bits=4):
    """Codes [m, n], scales and minima [m]: the steps of the core, in float32."""
    x = np.asarray(x, np.float32)
    finite = np.isfinite(x).all(axis=1)
    safe = np.where(finite[:, None], x, 0)
    high = np.float32(2**bits - 1)
    minima = float16_toward(safe.min(axis=1), -1)
    scales = float16_toward((safe.max(axis=1) - minima.astype(np.float32)) / high, 1)
    steps = scales.astype(np.float32)
    inverse = np.divide(1, steps, where=steps > 0, out=np.zeros_like(steps))
    above = (safe - minima.astype(np.float32)[:, None]) * inverse[:, None]
    codes = np.rint(np.clip(above, 0, high)).astype(np.uint8)
    nan = np.float16(np.nan)
    return codes * finite[:, None], np.where(finite, scales, nan), np.where(finite, minima, nan)


def kv_round(x, bits):
    """x [m, n] as the cache gives it back."""
    x = np.asarray(x)
    if bits == 32:
        return x.astype(np.float32)
    if bits == 16:
        return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
    codes, scales, minima = (a.astype(np.float32) for a in kv_quantize(x, bits))
    return scales[:, None] * codes + minima[:, None]


def read_loop(data, prefetch=0, streams=1):
    data = np.asarray(data).view(np.uint8)
    padded = np.concatenate([data, np.zeros(-len(data) % 8, np.uint8)])
    return int(np.bitwise_xor.reduce(padded.view(np.uint64), initial=np.uint64(0)))
