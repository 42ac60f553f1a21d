# SPDX-License-Identifier: Apache-2.0
"""The KV cache: what each width keeps, pages that come and go, attention over what is kept.

KVCache.read() gives what attention sees. Against a cache of 32 bits, which keeps everything, it is
compared bit for bit with the NumPy twin of the rounding; attention is compared with a float64
attention over read()'s own values, so that no code near a rounding boundary blurs either test.
"""

import os
import signal
import threading
import time

import numpy as np
import pytest
from blocks import frequencies, geometry, llama, shapes
from test_hygiene import leaks

import singlequant as sq
from singlequant import _C, _reference as reference
from singlequant.checkpoint.views import ValueCheckpoint
from singlequant.runtime.model import Model
from singlequant.sweep.prepare import prepare

PAGE = _C.PAGE_TOKENS
TOLERANCE = 2e-5  # absolute, of values of order 1, as in test_attention.py
BITS = [32, 16, 8, 4]
SIZES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100, 128, 300]


@pytest.fixture
def rng():
    return np.random.default_rng(21)


class Attention:
    """A layer whose q, k and v are random maps of a hidden size of 24, and that adds nothing."""

    def __init__(self, rng, heads=4, kv_heads=2, head_dim=8, window=0, value_scale=1.0):
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        self.geometry = geometry(24, 8, heads, kv_heads, head_dim, window, eps=1e-6,
                                 rotary=(frequencies(head_dim, 100.0), 1.0))
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


# ---- rounding -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", SIZES)
def test_kv_quantize_equals_twin(rng, bits, n):
    spread = np.float32(10.0) ** rng.uniform(-9, 4, (200, 1)).astype(np.float32)
    x = (rng.normal(size=(200, n)) + rng.normal(size=(200, 1)) * 3).astype(np.float32) * spread
    got, expected = _C.kv_quantize(x, bits), reference.kv_quantize(x, bits)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", [2, 3, 8, 9, 17, 40])
def test_smallest_value_of_either_zero_is_stored_as_zero(bits, n):
    x = np.ones((n, n), np.float32)
    x[np.arange(n), np.arange(n)] = -0.0  # at every place of a vector
    x[:, 0], x[0] = 0.0, [-0.0] + [1.0] * (n - 1)
    both = np.concatenate([x, x[:, ::-1], np.full((1, n), -0.0, np.float32)])
    _, _, minima = _C.kv_quantize(both, bits)
    np.testing.assert_array_equal(minima.view(np.uint16), 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_kv_quantize_is_within_half_a_step(rng, bits):
    x = (rng.normal(size=(500, 64)) * 3 + rng.normal(size=(500, 1)) * 20).astype(np.float32)
    codes, scales, minima = (a.astype(np.float64) for a in _C.kv_quantize(x, bits))
    error = np.abs(scales[:, None] * codes + minima[:, None] - x)
    assert (error <= scales[:, None] * (0.5 + 1e-4)).all()
    assert codes.min() == 0
    assert codes.max() == 2**bits - 1
    spread = x.max(axis=1) - x.min(axis=1)
    assert (scales * (2**bits - 1) <= spread * 1.002 + np.abs(x).max(axis=1) * 2**-9).all()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 0.1, -0.1, 3e-8, -3e-8, 1234.5, -1e-30])
def test_head_of_equal_values_comes_back(bits, value):
    codes, scales, minima = _C.kv_quantize(np.full((1, 40), value, np.float32), bits)
    back = scales.astype(np.float64) * codes[0] + minima.astype(np.float64)
    assert np.isfinite(back).all()
    assert np.ptp(back) == 0
    # a 15th of float16's spacing there; minimum and scale both come in steps of 2^-24 = 6e-8
    assert np.abs(back - value).max() <= max(abs(value) * 2**-10 / 15, 2**-24)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [8, 4])
def test_kv_quantize_keeps_huge_values_finite_and_lets_nan_through(bits):
    rows = np.array([[3e38, -3e38, 0], [1e5, 1e5, 1e5], [np.nan, 1, 2], [1, np.inf, 0]], np.float32)
    codes, scales, minima = _C.kv_quantize(rows, bits)
    assert np.isfinite(scales[:2]).all()
    assert np.isfinite(minima[:2]).all()
    assert np.isnan(scales[2:]).all()
    assert np.isnan(minima[2:]).all()
    assert not codes[2:].any()


@pytest.mark.parametrize(("x", "bits", "message"), [
    (np.ones((2, 3)), 16, "bits: expected 8 or 4, got 16"),
    (np.ones((2, 0)), 4, "x: expected rows of at least one element"),
    (np.ones(3), 4, "x: expected 2 dimensions"),
])
def test_kv_quantize_says_what_is_wrong(x, bits, message):
    with pytest.raises(ValueError, match=message):
        _C.kv_quantize(x, bits)


# ---- what is kept -------------------------------------------------------------------------------


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [2, 4, 8, 10, 16, 24, 34, 64, 128])
def test_cache_keeps_what_the_twin_keeps(rng, bits, head_dim):
    attention = Attention(rng, 2, 2, head_dim)
    hidden, where = hiddens(rng, PAGE + 3), tokens(PAGE + 3)
    whole, cache = attention.cache(), attention.cache(bits=bits, hadamard=False)
    for each in (whole, cache):
        attention.run(hidden, *where, each)
    for exact, kept in zip(whole.read(0, 0, PAGE + 3), cache.read(0, 0, PAGE + 3), strict=True):
        expected = reference.kv_round(exact.reshape(-1, head_dim), bits).reshape(exact.shape)
        np.testing.assert_array_equal(kept, expected)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head_dim", [2, 8, 32, 128])
def test_keys_take_the_fast_hadamard_and_values_do_not(rng, bits, head_dim):
    attention = Attention(rng, 2, 2, head_dim)
    hidden, where = hiddens(rng, 9), tokens(9)
    whole, cache = attention.cache(), attention.cache(bits=bits)
    for each in (whole, cache):
        attention.run(hidden, *where, each)
    (keys, values), (got_keys, got_values) = whole.read(0, 0, 9), cache.read(0, 0, 9)
    turned = reference.walsh_hadamard(keys).reshape(-1, head_dim)
    np.testing.assert_array_equal(got_keys.reshape(-1, head_dim), reference.kv_round(turned, bits))
    values = reference.kv_round(values.reshape(-1, head_dim), bits)
    np.testing.assert_array_equal(got_values.reshape(-1, head_dim), values)


@pytest.mark.parametrize("head_dim", [6, 12, 20, 28, 96])
def test_other_head_sizes_take_the_dense_hadamard(rng, head_dim):
    attention = Attention(rng, 2, 1, head_dim)
    hidden = hiddens(rng, 9)
    whole, cache = attention.cache(), attention.cache(bits=8)
    for each in (whole, cache):
        attention.run(hidden, *tokens(9), each)
    keys, got = whole.read(0, 0, 9)[0], cache.read(0, 0, 9)[0]
    turned = keys @ _C.hadamard_matrix(head_dim).T
    step = np.ptp(turned, axis=-1, keepdims=True) / 255
    assert (np.abs(got - turned) <= 0.51 * step).all()


def test_float16_is_clamped_to_finite_values(rng):
    attention = Attention(rng, 1, 1, 8, value_scale=1e7)
    cache = attention.cache(bits=16)
    out = attention.run(hiddens(rng, 5), *tokens(5), cache)
    values = cache.read(0, 0, 5)[1]
    assert np.abs(values).max() == 65504
    assert np.isfinite(out).all()


@pytest.mark.parametrize("bits", BITS)
def test_rewritten_position_keeps_its_neighbours(rng, bits):
    attention = Attention(rng)
    cache, hidden = attention.cache(bits=bits), hiddens(rng, 20)
    attention.run(hidden, *tokens(20), cache)
    before = cache.read(0, 0, 20)
    attention.run(hiddens(rng, 1), [0], [11], cache)
    others = np.arange(20) != 11
    for one, other in zip(before, cache.read(0, 0, 20), strict=True):
        np.testing.assert_array_equal(one[others], other[others])
        assert (one[11] != other[11]).any()
    attention.run(hidden[11:12], [0], [11], cache)
    for one, other in zip(before, cache.read(0, 0, 20), strict=True):
        np.testing.assert_array_equal(one, other)


# ---- attention ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"),
                         [(1, 1, 2), (4, 4, 8), (6, 2, 10), (33, 1, 4), (8, 2, 64), (4, 2, 24)])
@pytest.mark.parametrize("m", [1, 33, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 5])
def test_attention_equals_float64_over_what_is_kept(rng, bits, heads, kv_heads, head_dim, m):
    attention = Attention(rng, heads, kv_heads, head_dim)
    hidden, where, cache = hiddens(rng, m), tokens(m), attention.cache(bits=bits)
    got = attention.run(hidden, *where, cache)
    np.testing.assert_allclose(got, attention.expected(hidden, where[1], cache), atol=TOLERANCE)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("window", [1, 7, PAGE - 1, PAGE, PAGE + 1, 500])
def test_sliding_window_over_pages(rng, bits, window):
    m = 3 * PAGE + 2
    attention = Attention(rng, 4, 2, 8, window)
    hidden, where, cache = hiddens(rng, m), tokens(m), attention.cache(bits=bits)
    got = attention.run(hidden, *where, cache)
    np.testing.assert_allclose(got, attention.expected(hidden, where[1], cache), atol=TOLERANCE)
    steps, one = [], attention.cache(bits=bits)
    for t in range(m):
        steps.append(attention.run(hidden[t : t + 1], [0], [t], one))
    # the projections of one token and of many differ in their last bits: a code may step
    error = np.abs(np.concatenate(steps) - got).max(axis=1)
    assert np.median(error) < TOLERANCE
    assert error.max() < {32: TOLERANCE, 16: 3e-3, 8: 0.05, 4: 0.5}[bits]


@pytest.mark.parametrize("bits", BITS)
def test_hadamard_leaves_the_scores_as_they_are(rng, bits):
    """With almost no rounding, at 8 bits, both forms are near the exact attention."""
    attention = Attention(rng, 4, 2, 16)
    hidden, where = hiddens(rng, 70), tokens(70)
    exact = attention.run(hidden, *where, attention.cache())
    tolerance = {32: 0, 16: 5e-3, 8: 0.05, 4: 0.8}[bits]
    for hadamard in (False, True):
        got = attention.run(hidden, *where, attention.cache(bits=bits, hadamard=hadamard))
        assert np.abs(got - exact).max() <= tolerance


def test_hadamard_helps_keys_with_an_outlying_channel(rng):
    """Channel 5 of each key head is 30 times larger, and its query that much smaller."""
    a = Attention(rng, 4, 4, 64).geometry
    weights = {role: rng.normal(size=s).astype(np.float32) / 6 for role, s in shapes(a).items()}
    weights["k"][5::64] *= 30
    weights["q"][5::64] /= 30
    layer = _C.DecoderLayer(**llama(a, {role: (w, None) for role, w in weights.items()}))
    hidden, where = hiddens(rng, 100), tokens(100)

    def run(**options):
        cache = _C.KVCache(1, 1, 4, 64, 100, **options)
        return layer.forward(hidden.copy(), *where, cache, 0, record=True)["o"]

    exact = run()
    with_it, without = (np.abs(run(bits=4, hadamard=h) - exact).mean() for h in (True, False))
    assert with_it < 0.9 * without


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("window", [0, 70])
def test_token_that_is_not_finite_leaves_earlier_ones_alone(rng, bits, window):
    attention = Attention(rng, 4, 2, 8, window)
    hidden = hiddens(rng, 100)
    hidden[90, 3] = np.inf
    got = attention.run(hidden, *tokens(100), attention.cache(bits=bits))
    clean = attention.run(np.where(np.isfinite(hidden), hidden, 0), *tokens(100),
                          attention.cache(bits=bits))
    np.testing.assert_array_equal(got[:90], clean[:90])
    assert np.isnan(got[90:]).any(axis=1).all()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", BITS)
def test_nan_before_the_window_is_not_seen(rng, bits):
    attention = Attention(rng, 2, 1, 8, window=4)
    cache, hidden = attention.cache(bits=bits), hiddens(rng, 12)
    hidden[2] = np.nan
    outs = [attention.run(hidden[t : t + 1], [0], [t], cache) for t in range(12)]
    nan = [bool(np.isnan(out).any()) for out in outs]
    assert nan == [2 <= t < 6 for t in range(12)]


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [16, 24])
def test_layer_equals_its_twin(rng, bits, head_dim):
    """A code near a boundary may differ by one: few values may, and by little."""
    attention = Attention(rng, 4, 2, head_dim)
    hidden, where = hiddens(rng, 90), tokens(90)
    got = attention.run(hidden, *where, attention.cache(bits=bits))
    twin = reference.DecoderLayer(**attention.parts)
    cache = reference.KVCache(1, 1, 2, head_dim, 90, bits)
    expected = twin.forward(hidden.astype(np.float64), *where, cache, 0, record=True)["o"]
    error = np.abs(got - expected).max(axis=1)
    assert np.median(error) < TOLERANCE
    assert error.max() < {32: TOLERANCE, 16: 3e-3, 8: 0.05, 4: 0.5}[bits]


# ---- invariance ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", BITS)
def test_sequences_that_come_and_go_in_used_slots_give_the_bits_of_each_alone(rng, bits):
    """Steps of one token each: sequence s lives from step born[s] to died[s], and a slot is used
    again by a later one."""
    attention = Attention(rng, 4, 2, 16)
    slots, born, died = [0, 1, 2, 1, 0], [0, 3, 10, 80, 90], [70, 75, 150, 150, 140]
    hidden = hiddens(rng, 5 * 150).reshape(5, 150, 24)
    alone = []
    for s in range(5):
        cache, n = attention.cache(3, bits=bits), died[s] - born[s]
        alone.append(np.concatenate([
            attention.run(hidden[s, t : t + 1], [slots[s]], [t], cache) for t in range(n)
        ]))
    together, cache = [[] for _ in range(5)], attention.cache(3, bits=bits)
    for step in range(150):
        for s in range(5):
            if step == died[s]:
                cache.release(slots[s])
        live = [s for s in range(5) if born[s] <= step < died[s]]
        position = [step - born[s] for s in live]
        # one call for each: what is projected together may differ in its last bits
        for s, p in zip(live, position, strict=True):
            together[s].append(attention.run(hidden[s, p : p + 1], [slots[s]], [p], cache))
    for s in range(5):
        np.testing.assert_array_equal(np.concatenate(together[s]), alone[s])


@pytest.mark.parametrize("bits", BITS)
def test_threads_do_not_change_a_bit(rng, bits):
    attention = Attention(rng, 8, 4, 16)
    hidden = hiddens(rng, 300)
    sequence, position = np.repeat([1, 0, 2], 100), np.tile(np.arange(100), 3)
    seen = set()
    for threads in (1, 2, 5):
        _C.set_num_threads(threads)
        cache = attention.cache(3, bits=bits)
        seen.add(attention.run(hidden, sequence, position, cache).tobytes())
        seen.add(attention.run(hidden, sequence, position, cache).tobytes())
    assert len(seen) == 1


# ---- pages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [2, 10, 64, 128])
def test_memory_is_that_of_the_pages_held(rng, bits, head_dim):
    attention = Attention(rng, 3, 3, head_dim)
    cache = attention.cache(2, layers=2, bits=bits)
    codes = 3 * 2 * PAGE * head_dim * bits / 8
    scales = 0 if bits >= 16 else 3 * 4 * PAGE * 2
    padding = 0 if head_dim % 16 == 0 else 3 * PAGE * (14 if bits == 4 else 6 if bits == 8 else 0)
    assert codes + scales <= cache.page_bytes <= codes + scales + padding + 3 * 64
    assert cache.nbytes == 0
    attention.run(hiddens(rng, PAGE), *tokens(PAGE), cache)
    assert cache.nbytes == cache.page_bytes
    attention.run(hiddens(rng, 1), *tokens(1, PAGE), cache)
    assert cache.nbytes == 2 * cache.page_bytes
    attention.run(hiddens(rng, 1), *tokens(1, 0, 1), cache, 1)
    assert cache.nbytes == 3 * cache.page_bytes
    cache.release(0)
    assert cache.nbytes == 2 * cache.page_bytes  # one held, one free
    cache.release(1)
    assert cache.nbytes == 0


def test_4_bits_take_little_more_than_an_eighth_of_32():
    sizes = {b: _C.KVCache(1, 1, 8, 128, 64, b).page_bytes for b in BITS}
    assert sizes[16] / sizes[32] == 1 / 2
    assert sizes[8] / sizes[32] == 8.25 / 32
    assert sizes[4] / sizes[32] == 4.25 / 32


@pytest.mark.parametrize("bits", BITS)
def test_reused_pages_hold_nothing_of_the_past(rng, bits):
    attention = Attention(rng)
    cache, fresh = attention.cache(2, bits=bits), attention.cache(2, bits=bits)
    attention.run(hiddens(rng, 150) * 5, *tokens(150), cache)
    attention.run(hiddens(rng, 150), *tokens(150, 0, 1), cache)
    cache.release(0)
    assert not np.any(cache.read(0, 0, 150))
    hidden = hiddens(rng, 3)
    for each in (cache, fresh):  # positions 0 to 4 and 8 on stay unwritten, and are seen as zeros
        out = attention.run(hidden, *tokens(3, 5), each)
    for one, other in zip(cache.read(0, 0, 300), fresh.read(0, 0, 300), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(out, attention.run(hidden, *tokens(3, 5), cache))
    np.testing.assert_allclose(
        out, attention.expected(hidden, np.arange(5, 8), cache), atol=TOLERANCE
    )


@pytest.mark.parametrize("bits", BITS)
def test_gap_of_whole_pages_holds_zeros(rng, bits):
    attention = Attention(rng)
    cache, hidden = attention.cache(bits=bits), hiddens(rng, 1)
    got = attention.run(hidden, [0], [3 * PAGE + 1], cache)
    assert cache.nbytes == cache.page_bytes
    np.testing.assert_allclose(got, attention.expected(hidden, [3 * PAGE + 1], cache),
                               atol=TOLERANCE)


def test_reserve_takes_the_pages_of_all_layers_or_none(rng):
    attention = Attention(rng)
    page = attention.cache(bits=4).page_bytes
    cache = attention.cache(4, layers=3, bits=4, limit=7 * page)
    cache.reserve([0, 0, 1], [0, PAGE - 1, 5])
    assert cache.nbytes == 6 * page
    with pytest.raises(MemoryError, match=rf"limit: expected room for more pages of {page} bytes, "
                                          rf"found {6 * page} of {7 * page} bytes taken"):
        cache.reserve([0, 2], [5, 0])
    assert cache.nbytes == 6 * page
    cache.reserve([0], [7])
    hidden = hiddens(rng, 2)
    with pytest.raises(MemoryError, match="limit: expected room for more pages of"):
        attention.layer.forward(hidden, [0, 0], [PAGE, 2 * PAGE], cache, 1)
    assert not np.any(cache.read(1, 0, 200))
    attention.layer.forward(hidden, [1, 1], [PAGE, PAGE + 1], cache, 1)  # the seventh
    assert cache.nbytes == 7 * page
    cache.release(1)
    cache.reserve([3], [9])  # takes the place of what was freed
    assert cache.nbytes <= 7 * page


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # CPython's note on forking with threads
def test_cache_in_use_at_a_fork_is_refused_by_the_child_and_an_idle_one_is_not(rng):
    attention = Attention(rng)
    many = 12_000  # half a second of attention
    busy, idle, hidden = attention.cache(capacity=many), attention.cache(), hiddens(rng, many)
    sq.set_num_threads(1)
    thread = threading.Thread(target=attention.run, args=(hidden, *tokens(many), busy))
    thread.start()
    while not busy.nbytes:
        time.sleep(0.001)
    child = os.fork()  # the thread is in the core, in a call that has taken its pages
    if child == 0:
        signal.alarm(20)  # ends the child where it would wait for ever
        failed = 1
        try:
            idle.reserve([0], [5])
            busy.reserve([0], [5])
        except RuntimeError as error:
            failed = 0 if "when this process was forked" in str(error) else 2
        os._exit(failed)
    _, status = os.waitpid(child, 0)
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_forward_refuses_more_tokens_than_a_call_may_have(rng):
    attention = Attention(rng)
    hidden = np.empty((2**24 + 1, 24), np.float32)  # never touched
    with pytest.raises(ValueError, match="hidden: expected at most 16777216 tokens, got 16777217"):
        attention.layer.forward(hidden, [0], [0], attention.cache(), 0)


def test_limit_below_a_page_is_reached_at_once(rng):
    attention = Attention(rng)
    with pytest.raises(MemoryError, match="limit"):
        attention.run(hiddens(rng, 1), [0], [0], attention.cache(limit=5))


def test_many_sequences_come_and_go_without_growing(rng):
    attention = Attention(rng, 2, 1, 8)
    cache, largest = attention.cache(8, bits=4), 0
    for round_ in range(60):
        slot, n = round_ % 8, int(rng.integers(1, 200))
        cache.release(slot)
        attention.run(hiddens(rng, n), *tokens(n, 0, slot), cache)
        largest = max(largest, cache.nbytes)
    assert largest <= 2 * 8 * 4 * cache.page_bytes
    for slot in range(8):
        cache.release(slot)
    assert cache.nbytes == 0


@pytest.mark.parametrize("bits", [32, 4])
def test_cache_leaks_nothing(rng, bits):
    attention = Attention(rng, 2, 1, 12)  # with a dense Hadamard
    hidden = hiddens(rng, 70)

    def call():
        cache = attention.cache(2, bits=bits, limit=3 * attention.cache(bits=bits).page_bytes)
        attention.run(hidden, *tokens(70), cache)
        with pytest.raises(MemoryError):
            cache.reserve([0, 1], [140, 140])
        cache.release(0)
        attention.run(hidden, *tokens(70, 5, 1), cache)
        cache.read(0, 1, 70)

    assert not leaks(call)


def test_released_sequence_may_be_released_again():
    cache = _C.KVCache(2, 2, 2, 8, 100)
    cache.release(1)
    cache.release(1)
    assert cache.nbytes == 0


def test_threads_that_share_a_cache_wait_for_each_other(rng):
    attention = Attention(rng, 4, 2, 16)
    cache = attention.cache(4, layers=4, bits=4, capacity=1000)
    hidden = hiddens(rng, 40)
    expected = attention.run(hidden, *tokens(40), attention.cache(bits=4))
    failures = []

    def work(i):
        for _ in range(20):
            out = attention.run(hidden, *tokens(40, 0, i), cache, i)
            if not (out == expected).all():
                failures.append(i)
            cache.release(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert cache.nbytes == 0


# ---- hostile input ------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"bits": 3}, "bits: expected 4, 8, 16 or 32, got 3"),
    ({"bits": -4}, "bits: expected 4, 8, 16 or 32, got -4"),
    ({"limit": -1}, "limit: expected at least 0, got -1"),
    ({"capacity": 2**31 + 1}, "at most 2\\^31 - 1 sequences, 2\\^31 positions"),
    ({"sequences": 2**31}, "at most 2\\^31 - 1 sequences"),
    ({"head_dim": 2**25}, "head_dim of 2\\^24, got 1, 9 and 33554432"),
    ({"sequences": 0}, "sequences: expected at least 1, got 0"),
    ({"layers": -2}, "layers: expected at least 1, got -2"),
])
def test_cache_of_impossible_sizes_is_refused(options, message):
    sizes = {"layers": 1, "sequences": 1, "kv_heads": 1, "head_dim": 8, "capacity": 9}
    with pytest.raises(ValueError, match=message):
        _C.KVCache(**(sizes | options))


@pytest.mark.parametrize(("method", "arguments", "message"), [
    ("release", (-1,), "sequence: expected 0 to 1, got -1"),
    ("release", (2,), "sequence: expected 0 to 1, got 2"),
    ("reserve", ([2], [0]), r"sequence\[0\]: expected 0 to 1, got 2"),
    ("reserve", ([0, -1], [0, 0]), r"sequence\[1\]: expected 0 to 1, got -1"),
    ("reserve", ([0], [9]), r"position\[0\]: expected 0 to 8, got 9"),
    ("reserve", ([0], [0, 1]), r"position: expected shape\[0\] = 1, got 2"),
    ("read", (0, 0, 10), "count: expected 0 to 9, got 10"),
    ("read", (0, -1, 1), "sequence: expected 0 to 1, got -1"),
    ("read", (1, 0, 1), "layer: expected 0 to 0, got 1"),
])
def test_cache_methods_say_what_is_out_of_range(method, arguments, message):
    cache = _C.KVCache(1, 2, 1, 8, 9)
    with pytest.raises(ValueError, match=message):
        getattr(cache, method)(*arguments)
    assert cache.nbytes == 0


def test_cache_says_what_it_is():
    cache = _C.KVCache(2, 3, 4, 8, 100, bits=4, limit=10**6)
    assert (cache.bits, cache.hadamard, cache.limit, cache.page_tokens) == (4, True, 10**6, 64)
    assert repr(cache) == ("KVCache(layers=2, sequences=3, kv_heads=4, head_dim=8, capacity=100, "
                           "bits=4, hadamard)")
    assert not _C.KVCache(1, 1, 1, 8, 9, 16).hadamard  # floats are not rotated
    with pytest.raises(AttributeError):
        cache.bits = 8


# ---- a quantized model --------------------------------------------------------------------------


def folder(make_checkpoint, tmp_path, **options):
    return make_checkpoint(tmp_path / "model", hidden=96, heads=6, kv_heads=2, intermediate=128,
                           layers=2, **options)


@pytest.mark.parametrize("options", [
    {}, {"bias": True, "tie": False}, {"head_dim": 24}, {"kv_heads": 6, "dtype": "bfloat16"},
    {"architecture": "MistralForCausalLM"},
])
def test_rotated_value_heads_leave_the_model_as_it_is(make_checkpoint, tmp_path, options):
    sizes = {"hidden": 96, "heads": 6, "kv_heads": 2} | options
    checkpoint = sq.load_checkpoint(make_checkpoint(tmp_path / "m", **sizes))
    view = ValueCheckpoint(checkpoint)
    tokens = np.random.default_rng(0).integers(0, 320, (2, 80))
    expected, found = Model(checkpoint).forward(tokens), Model(view).forward(tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert view.fingerprint != checkpoint.fingerprint
    for i in range(checkpoint.spec.layers):
        before, after = checkpoint.layer(i).linears, view.layer(i).linears
        changed = {role for role in before
                   if not np.array_equal(before[role].weight, after[role].weight)}
        assert changed == {"v", "o"}
        for linear in after.values():
            assert view.tensors[f"{linear.name}.weight"].nbytes == linear.weight.nbytes


@pytest.mark.parametrize("method", ["balanced", "quarot", "duquant", "singlequant", "none"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_method_quantizes_with_kv_bits(make_checkpoint, tmp_path, text, method, bits):
    model = folder(make_checkpoint, tmp_path, bias=True)
    config = sq.QuantConfig(scheme="w4a8", method=method, kv_bits=bits, calibration_tokens=128)
    sq.quantize_folder(model, tmp_path / "out", config, text)
    loaded = sq.load(tmp_path / "out")
    assert loaded.checkpoint.quant_config.kv_bits == bits
    assert loaded.kv_bits == bits
    assert loaded.new_session(1, 8)._cache.bits == bits
    tokens = np.random.default_rng(1).integers(0, 320, (2, 80))
    original, found = sq.load(model).forward(tokens), loaded.forward(tokens)
    plain = sq.load(tmp_path / "out", 32).forward(tokens)
    scale = np.abs(original).max()
    assert np.abs(plain - original).mean() < 0.05 * scale
    assert 0 < np.abs(found - plain).mean() < (0.05 if bits == 4 else 0.01) * scale


def test_values_are_rotated_once(make_checkpoint, tmp_path, text):
    """The view stands before every method but those that rotate value heads themselves."""
    checkpoint = sq.load_checkpoint(folder(make_checkpoint, tmp_path))
    windows = np.arange(64).reshape(2, 32)
    for method, bits, kind in (("balanced", 4, "ValueCheckpoint"), ("balanced", 16, "Checkpoint"),
                               ("duquant", 8, "ValueCheckpoint"), ("quarot", 4, "Residual")):
        view = prepare(checkpoint, sq.QuantConfig(method=method, kv_bits=bits), windows)
        assert type(view).__name__.startswith(kind)
        if method == "quarot":
            assert view.source is checkpoint


def test_recipes_with_other_kv_bits_do_not_resume_each_other(make_checkpoint, tmp_path, text):
    model = folder(make_checkpoint, tmp_path)
    config = {"scheme": "w4a8", "weights": "rtn", "calibration_tokens": 64}

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sq.quantize_folder(model, tmp_path / "out", sq.QuantConfig(kv_bits=4, **config), text,
                           resume=True, progress=stop)
    with pytest.raises(ValueError, match=r"config\.kv_bits: expected 8, found 4"):
        sq.quantize_folder(model, tmp_path / "out", sq.QuantConfig(kv_bits=8, **config), text,
                           resume=True)


def test_dry_run_and_ignored_value_linears_take_kv_bits(make_checkpoint, tmp_path, text):
    model = folder(make_checkpoint, tmp_path)
    config = sq.QuantConfig(kv_bits=4, calibration_tokens=64, weights="rtn",
                            ignore=("*.v_proj", "*.o_proj"))
    estimate = sq.dry_run(model, config, text)
    sq.quantize_folder(model, tmp_path / "out", config, text)
    size = sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert abs(estimate.bytes_after / size - 1) < 0.05
    out = sq.load(tmp_path / "out", 32)
    tokens = np.random.default_rng(1).integers(0, 320, (1, 60))
    expected = sq.load(model).forward(tokens)
    assert np.abs(out.forward(tokens) - expected).mean() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [0, 2, 32, 4.0, True, "8", None])
def test_config_refuses_other_kv_bits(bits):
    with pytest.raises(ValueError, match="kv_bits: expected one of 4, 8, 16, found"):
        sq.QuantConfig(kv_bits=bits)
