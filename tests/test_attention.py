"""Rotary embedding, KV cache and attention, seen through what a layer records at its o site.

The layers here pass their input on to q, k and v through given matrices and add nothing afterwards.
"""

import numpy as np
import pytest
from blocks import frequencies, geometry, llama, new_cache, shapes

from singlequant import _C, _reference as reference

TOLERANCE = (
    2e-5  # absolute, of values of order 1: scores reach 30, so softmax multiplies 6e-8 by that
)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


class Attention:
    """Attention alone: heads, kv_heads, head_dim, and projections of a hidden size of choice."""

    def __init__(self, rng, heads, kv_heads, head_dim, hidden=24, window=0, inv_freq=None, scale=1):
        inv_freq = frequencies(head_dim) if inv_freq is None else np.asarray(inv_freq, np.float32)
        a = geometry(hidden, 8, heads, kv_heads, head_dim, window, eps=1e-6,
                     rotary={"inv_freq": inv_freq, "scale": scale})
        self.weights = {
            role: rng.normal(size=s).astype(np.float32) / 3 if role in "qkv"
            else np.zeros(s, np.float32) for role, s in shapes(a).items()
        }
        self.parts = llama(a, {role: (w, None) for role, w in self.weights.items()})
        self.layer = _C.DecoderLayer(**self.parts)
        self.twin = reference.DecoderLayer(**self.parts)

    def cache(self, sequences=1, capacity=64, kind=_C, layers=1):
        return new_cache(kind, self.parts, sequences, capacity, layers)

    def run(self, hidden, sequence, position, cache):
        """What attention gives, [m, heads * head_dim]."""
        hidden = hidden.copy()
        return self.layer.forward(hidden, sequence, position, cache, 0, record=True)["o"]

    def expected(self, hidden, sequence, position, sequences=1, capacity=64):
        cache = self.cache(sequences, capacity, reference)
        twin = hidden.astype(np.float64)
        return self.twin.forward(twin, sequence, position, cache, 0, record=True)["o"]


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(1, 1, 2), (4, 4, 8), (4, 2, 8), (6, 1, 10), (33, 1, 4), (8, 2, 64)],
)
@pytest.mark.parametrize("m", [1, 2, 31, 33, 70])
def test_attention_equals_twin(rng, heads, kv_heads, head_dim, m):
    attention = Attention(rng, heads, kv_heads, head_dim)
    hidden = rng.normal(size=(m, 24)).astype(np.float32)
    where = np.zeros(m, int), np.arange(m)
    got = attention.run(hidden, *where, attention.cache(capacity=80))
    np.testing.assert_allclose(
        got, attention.expected(hidden, *where, capacity=80), atol=TOLERANCE, rtol=0
    )


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("window", [1, 2, 7, 32, 33, 200])
def test_sliding_window_equals_twin_and_hides_older_tokens(rng, window):
    attention = Attention(rng, 4, 2, 8, window=window)
    hidden = rng.normal(size=(100, 24)).astype(np.float32)
    where = np.zeros(100, int), np.arange(100)
    got = attention.run(hidden, *where, attention.cache(capacity=100))
    expected = attention.expected(hidden, *where, capacity=100)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)
    if window < 100:
        changed = hidden.copy()
        changed[100 - window - 1] += 1  # just outside the last token's window
        after = attention.run(changed, *where, attention.cache(capacity=100))
        assert (after[-1] == got[-1]).all()
        assert (after[-2] != got[-2]).any()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("window", [0, 5])
def test_sequences_of_unequal_length_equal_twin(rng, window):
    attention = Attention(rng, 4, 2, 8, window=window)
    lengths = [5, 1, 40, 17]
    sequence = np.repeat([2, 0, 3, 1], lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    hidden = rng.normal(size=(sum(lengths), 24)).astype(np.float32)
    got = attention.run(hidden, sequence, position, attention.cache(4))
    expected = attention.expected(hidden, sequence, position, 4)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


def test_interleaved_tokens_equal_twin(rng):
    attention = Attention(rng, 4, 2, 8)
    sequence, position = np.tile([0, 1, 2], 9), np.repeat(np.arange(9), 3)
    hidden = rng.normal(size=(27, 24)).astype(np.float32)
    got = attention.run(hidden, sequence, position, attention.cache(3))
    expected = attention.expected(hidden, sequence, position, 3)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


def test_order_of_tokens_in_a_call_does_not_matter(rng):
    attention = Attention(rng, 4, 2, 8)
    hidden = rng.normal(size=(40, 24)).astype(np.float32)
    position = np.arange(40)
    got = attention.run(hidden, np.zeros(40, int), position, attention.cache())
    order = rng.permutation(40)
    mixed = attention.run(hidden[order], np.zeros(40, int), position[order], attention.cache())
    np.testing.assert_allclose(mixed, got[order], atol=TOLERANCE, rtol=0)


def test_prompt_longer_than_a_chunk_equals_pieces(rng):
    """1100 tokens are worked on in several chunks; 37 at a time in one each."""
    attention = Attention(rng, 4, 2, 8)
    hidden = rng.normal(size=(1100, 24)).astype(np.float32)
    zeros, position = np.zeros(1100, int), np.arange(1100)
    whole = attention.run(hidden, zeros, position, attention.cache(capacity=1100))
    cache = attention.cache(capacity=1100)
    pieces = [
        attention.run(hidden[i : i + 37], zeros[i : i + 37], position[i : i + 37], cache)
        for i in range(0, 1100, 37)
    ]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("capacity", [9, 10, 64, 1000])
def test_capacity_does_not_change_bits(rng, capacity):
    attention = Attention(rng, 4, 2, 8)
    hidden = rng.normal(size=(9, 24)).astype(np.float32)
    where = np.zeros(9, int), np.arange(9)
    got = attention.run(hidden, *where, attention.cache(capacity=capacity))
    assert (got == attention.run(hidden, *where, attention.cache(capacity=77))).all()


def test_layers_of_a_cache_are_separate(rng):
    attention = Attention(rng, 2, 2, 4)
    cache = attention.cache(1, 8, layers=3)
    first, second = rng.normal(size=(2, 3, 24)).astype(np.float32)
    where = np.zeros(3, int), np.arange(3)
    for layer, hidden in [(0, second), (1, first), (2, second)]:
        attention.layer.forward(hidden.copy(), *where, cache, layer)
    last = rng.normal(size=(1, 24)).astype(np.float32)
    got = attention.layer.forward(last.copy(), [0], [3], cache, 1, record=True)["o"]
    expected = attention.expected(
        np.concatenate([first, last]), np.zeros(4, int), np.arange(4), capacity=8
    )
    np.testing.assert_allclose(got, expected[-1:], atol=TOLERANCE, rtol=0)


def test_large_scores_stay_finite(rng):
    attention = Attention(rng, 2, 1, 8)
    for role in "qk":
        attention.weights[role] *= 100
    layer = _C.DecoderLayer(**attention.parts)
    hidden = rng.normal(size=(20, 24)).astype(np.float32)
    cache = attention.cache()
    out = layer.forward(hidden, np.zeros(20, int), np.arange(20), cache, 0, record=True)["o"]
    assert np.isfinite(out).all()


# ---- rotary embedding ---------------------------------------------------------------------------


def llama3_frequencies(head_dim, base=500000.0, factor=8.0, low=1.0, high=4.0, old=8192):
    """The llama3 rule, one frequency at a time."""
    scaled = []
    for i in range(head_dim // 2):
        f = base ** (-2 * i / head_dim)
        wavelength = 2 * np.pi / f
        if wavelength > old / low:
            f /= factor
        elif wavelength > old / high:
            smooth = (old / wavelength - low) / (high - low)
            f = (1 - smooth) * f / factor + smooth * f
        scaled.append(f)
    return scaled


@pytest.mark.parametrize("scale", [1.0, 1.25])
@pytest.mark.parametrize("inv_freq", [None, "llama3"])
def test_rotary_embedding_by_hand(rng, inv_freq, scale):
    """One head, two tokens: the second attends to the first with a score that shows the angle."""
    d, hidden = 16, 16
    frequencies = llama3_frequencies(d) if inv_freq else 10000.0 ** (-np.arange(8) / 8)
    attention = Attention(rng, 1, 1, d, hidden, inv_freq=frequencies, scale=scale)
    x = rng.normal(size=(2, hidden)).astype(np.float32)
    x /= np.sqrt(np.mean(x**2, axis=1, keepdims=True))
    positions = [3, 250]
    cache = attention.cache(capacity=300)
    attention.run(x[:1], [0], positions[:1], cache)
    got = attention.run(x[1:], [0], positions[1:], cache)[0]

    wq, wk, wv = (attention.weights[role] for role in "qkv")
    x = x.astype(np.float64)

    def turned(v, position):
        angle = position * np.asarray(frequencies)
        z = (v[: d // 2] + 1j * v[d // 2 :]) * np.exp(1j * angle) * scale
        return np.concatenate([z.real, z.imag])

    q = turned(wq @ x[1], positions[1])
    scores = np.zeros(251)  # positions never written hold zero keys and zero values
    scores[positions[0]] = q @ turned(wk @ x[0], positions[0]) / np.sqrt(d)
    scores[positions[1]] = q @ turned(wk @ x[1], positions[1]) / np.sqrt(d)
    p = reference.softmax(scores)
    expected = p[positions[0]] * (wv @ x[0]) + p[positions[1]] * (wv @ x[1])
    # angles of a few hundred radians are rounded to float32: 250 * 6e-8
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)


def test_scores_depend_on_distance_alone(rng):
    attention = Attention(rng, 2, 2, 8, window=4)
    hidden = rng.normal(size=(4, 24)).astype(np.float32)
    near = attention.run(hidden, np.zeros(4, int), np.arange(4), attention.cache())
    far = attention.run(hidden, np.zeros(4, int), np.arange(4) + 500, attention.cache(capacity=504))
    # near's window holds the same keys for its last token only
    np.testing.assert_allclose(far[-1], near[-1], atol=1e-4)


# ---- bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequence", "position", "message"),
    [
        ([0], [8], r"position\[0\]: expected 0 to 7, got 8"),
        ([0], [-1], r"position\[0\]: expected 0 to 7, got -1"),
        ([2], [0], r"sequence\[0\]: expected 0 to 1, got 2"),
        ([-1], [0], r"sequence\[0\]: expected 0 to 1, got -1"),
        ([2**32], [0], r"sequence\[0\]: expected 0 to 1, got 4294967296"),
        ([0, 0], [0], r"sequence: expected shape\[0\] = 1, got 2"),
        ([0], [0, 1], r"position: expected shape\[0\] = 1, got 2"),
    ],
)
def test_cache_bounds_are_errors(rng, sequence, position, message):
    attention = Attention(rng, 2, 1, 4)
    hidden = np.ones((1, 24), np.float32)
    with pytest.raises(ValueError, match=message):
        attention.layer.forward(hidden, sequence, position, attention.cache(2, 8), 0)
    assert (hidden == 1).all()


def test_cache_of_another_shape_is_an_error(rng):
    attention = Attention(rng, 2, 1, 4)
    hidden = np.ones((1, 24), np.float32)
    with pytest.raises(ValueError, match=r"\(kv_heads, head_dim\) = \(1, 4\), got \(2, 4\)"):
        attention.layer.forward(hidden, [0], [0], _C.KVCache(1, 1, 2, 4, 8), 0)
    with pytest.raises(ValueError, match="layer: expected 0 to 0, got 1"):
        attention.layer.forward(hidden, [0], [0], attention.cache(), 1)
    with pytest.raises(TypeError, match="KVCache"):
        attention.layer.forward(hidden, [0], [0], None, 0)


def test_cache_attributes_and_limits():
    cache = _C.KVCache(2, 3, 4, 8, 100)
    assert (cache.layers, cache.sequences, cache.capacity) == (2, 3, 100)
    assert (cache.kv_heads, cache.head_dim) == (4, 8)
    assert cache.nbytes == 0  # pages are taken as they are needed
    assert cache.page_bytes == 2 * 4 * 8 * cache.page_tokens * 4
    assert "capacity=100" in repr(cache)
    with pytest.raises(ValueError, match="kv_heads: expected at least 1, got 0"):
        _C.KVCache(1, 1, 0, 8, 100)
    with pytest.raises(MemoryError):
        _C.KVCache(2**40, 2**30, 2**20, 8, 100)
    with pytest.raises(MemoryError):
        _C.KVCache(2**20, 2**20, 2**5, 8, 100)
    with pytest.raises(AttributeError):
        cache.capacity = 5
