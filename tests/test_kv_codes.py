# SPDX-License-Identifier: Apache-2.0
"""The KV cache: what each width keeps, and attention over what is kept.

KVCache.read() gives what attention sees. Against a cache of 32 bits, which keeps everything, it is
compared bit for bit with the NumPy twin of the rounding; attention is compared with a float64
attention over read()'s own values, so that no code near a rounding boundary blurs either test.
"""

import numpy as np
import pytest
from blocks import geometry, llama, shapes
from cached_attention import BITS, PAGE, TOLERANCE, Attention, hiddens, tokens

from singlequant import _C, _reference as reference

SEED = 21
SIZES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100, 128, 300]


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


# ---- beyond float16 -----------------------------------------------------------------------------


def test_float16_is_clamped_to_finite_values(rng):
    attention = Attention(rng, 1, 1, 8, value_scale=1e7)
    cache = attention.cache(bits=16)
    out = attention.run(hiddens(rng, 5), *tokens(5), cache)
    values = cache.read(0, 0, 5)[1]
    assert np.abs(values).max() == 65504
    assert np.isfinite(out).all()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("head_dim", [2, 10, 16, 64, 300])
@pytest.mark.parametrize("value_scale", [1.0, 1e7, 1e30])
def test_bfloat16_keeps_what_the_twin_keeps(rng, bits, head_dim, value_scale):
    attention = Attention(rng, 2, 2, head_dim, value_scale=value_scale)
    hidden, where = hiddens(rng, PAGE + 3), tokens(PAGE + 3)
    whole = attention.cache()
    cache = attention.cache(bits=bits, hadamard=False, bfloat16=True)
    for each in (whole, cache):
        out = attention.run(hidden, *where, each)
    for exact, kept in zip(whole.read(0, 0, PAGE + 3), cache.read(0, 0, PAGE + 3), strict=True):
        rows = exact.reshape(-1, head_dim)
        expected = reference.kv_round(rows, bits, bfloat16=True).reshape(exact.shape)
        np.testing.assert_array_equal(kept, expected)
        step = {16: 2**-7 * np.abs(exact), 8: np.ptp(exact, axis=-1, keepdims=True) / 255,
                4: np.ptp(exact, axis=-1, keepdims=True) / 15}[bits]
        offset = np.abs(exact).max(axis=-1, keepdims=True) / 255
        assert (np.abs(kept - exact) <= 0.51 * step + (offset if bits < 16 else 0)).all()
    assert cache.clamped == 0
    np.testing.assert_allclose(out, attention.expected(hidden, where[1], cache),
                               atol=TOLERANCE * value_scale)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [2**-120, 2**-126, 2**-130, 2**-140])
def test_bfloat16_of_a_tiny_range_is_within_half_a_step(rng, bits, size):
    """Its scale is too small to be divided by."""
    value = (rng.uniform(size=40) * size).astype(np.float32)
    kept = stored(value, bits=bits, bfloat16=True).read(0, 0, 1)[1].ravel()
    np.testing.assert_array_equal(kept, reference.kv_round(value[None], bits, bfloat16=True)[0])
    step = max(np.ptp(value) * 1.02 / (2**bits - 1), 2**-126)
    assert np.abs(kept.astype(np.float64) - value).max() <= 0.51 * step


def stored(value, **options):
    """A cache that holds the value [head_dim] at position 0, whose keys are zeros."""
    d = len(value)
    g = geometry(8, 8, 1, 1, d)
    weights = {role: (np.zeros(s, np.float32), None) for role, s in shapes(g).items()}
    weights["v"] = weights["v"][0], np.asarray(value, np.float32)
    cache = _C.KVCache(1, 1, 1, d, 9, hadamard=False, **options)
    _C.DecoderLayer(**llama(g, weights)).forward(np.ones((1, 8), np.float32), [0], [0], cache, 0)
    return cache


@pytest.mark.usefixtures("table")
def test_bfloat16_is_rounded_to_nearest_and_halves_to_even(rng):
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF808000, 0xBF81FFFF, 0x00008000,
                     0x00018000, 0x80000001, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7FFFFF,
                     0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001], np.uint32)
    bits = np.concatenate([bits, rng.integers(0, 2**32, 1000).astype(np.uint32)])
    value = bits.view(np.float32)
    cache = stored(value, bits=16, bfloat16=True)
    kept = cache.read(0, 0, 1)[1].ravel()
    np.testing.assert_array_equal(kept, reference.kv_round(value, 16, bfloat16=True))
    expected = np.array([0x3F80, 0x3F82, 0x3F81, 0xBF80, 0xBF82, 0, 2, 0x8000, 0x7F7F, 0x7F7F,
                         0x7F7F, 0xFF7F, 0x7F7F, 0xFF7F], np.uint32) << 16
    np.testing.assert_array_equal(kept[:14].view(np.uint32), expected)
    assert np.isnan(kept[14:16]).all()
    with np.errstate(invalid="ignore"):  # a signalling NaN
        assert cache.clamped == reference.kv_clamped(value, 16, bfloat16=True)


WATCHED = {
    "small": [1, -2.5, 0], "edge": [65504, -65504, 1], "beyond": [65536, -1e6, 5, 7e4],
    "wide": [-6e4, 3e7, 1, 2], "low": [-1e9, 1, 2, -2e9], "infinite": [np.inf, 3, -np.inf],
    "nan": [np.nan, 3, -5], "both": [np.nan, -np.inf, 70000.0], "nothing": [np.nan, np.nan],
    "huge": [3e38, -3e38, 1],
}  # fmt: skip


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", WATCHED)
def test_cache_notes_the_largest_and_what_it_clamps(name, bits, bfloat16):
    value = np.array(WATCHED[name] * 5, np.float32)
    cache = stored(value, bits=bits, bfloat16=bfloat16)
    known = np.abs(value[~np.isnan(value)])
    assert cache.largest == (known.max() if known.size else 0)
    assert cache.clamped == reference.kv_clamped(value[None], bits, bfloat16)
    finite = np.isfinite(value).all()
    if bits == 16 or finite:
        assert (cache.clamped > 0) == (known.size > 0 and bits < 32 and {
            False: known.max() > {16: 65504, 8: 65504 * 255, 4: 65504 * 15}[bits]
            or (bits < 16 and value.min() < -65504),
            True: known.max() > 3.3895e38 or (bits < 16 and known.max() > 1e38),
        }[bfloat16])
    kept = cache.read(0, 0, 1)[1].ravel()
    np.testing.assert_array_equal(kept, reference.kv_round(value[None], bits, bfloat16)[0])


def test_notes_of_a_cache_grow_and_stay(rng):
    attention = Attention(rng, 2, 2, 8, value_scale=1e6)
    cache, twin = attention.cache(2, bits=16), reference.KVCache(1, 2, 2, 8, 300, 16)
    layer = reference.DecoderLayer(**attention.parts)
    assert (cache.largest, cache.clamped, cache.bfloat16) == (0, 0, False)
    for sequence in range(2):
        hidden, where = hiddens(rng, 70), tokens(70, 0, sequence)
        attention.run(hidden, *where, cache)
        layer.forward(hidden.astype(np.float64), *where, twin, 0)
        assert cache.largest == pytest.approx(twin.largest, rel=1e-5)
        assert abs(cache.clamped - twin.clamped) <= 2
    noted = cache.largest, cache.clamped
    cache.release(0)
    assert noted == (cache.largest, cache.clamped)
    assert noted[1] > 100


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
    assert np.median(error) < (10 if bits == 8 else 1) * TOLERANCE
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
    assert np.median(error) < (10 if bits == 8 else 1) * TOLERANCE
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
