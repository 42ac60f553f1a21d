"""Quantizers: codes, scales and zeros equal the NumPy twin's byte for byte, on every table."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from singlequant import _C, _reference as reference

TABLES = _C.kernels()["runnable"]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("clip", [1.0, 0.85])
@pytest.mark.parametrize("search", [False, True], ids=["plain", "search"])
def test_quantize_equals_twin(table, bits, symmetric, clip, search):
    rng = np.random.default_rng(bits)
    for k, group in [(1, 0), (7, 0), (31, 0), (33, 11), (40, 0), (96, 32), (129, 0), (256, 128)]:
        x = (rng.standard_t(4, (3, k)) * rng.choice([1e-20, 1e-3, 1, 1e20], (3, 1))).astype("f4")
        found = _C.quantize(x, bits, group, symmetric, clip, search)
        assert_same(found, reference.quantize(x, bits, group, symmetric, clip, search))


@settings(max_examples=60, deadline=None)
@given(
    x=arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=40),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    clip=st.floats(2.0**-30, 1.0, width=32),
    search=st.booleans(),
)
def test_quantize_equals_twin_on_any_floats(x, bits, symmetric, clip, search):
    expected = reference.quantize(x, bits, 0, symmetric, clip, search)
    before = _C.kernels()["active"]
    for name in TABLES:
        _C.use_kernels(name)
        assert_same(_C.quantize(x, bits, 0, symmetric, clip, search), expected)
    _C.use_kernels(before)


def test_quantize_rounds_halves_to_even(table):
    x = np.float32([[7, 0.5, 1.5, 2.5, -0.5, -1.5, -6.5, -7]])
    codes, scales, zeros = _C.quantize(x)
    assert scales[0, 0] == 1
    assert zeros is None
    assert codes.tolist() == [[7, 0, 2, 2, 0, -2, -6, -7]]


def test_quantize_uses_the_lowest_code_when_clipping(table):
    assert _C.quantize(np.float32([[-8, 7, 1]]), clip=0.5)[0].min() == -8


def test_quantize_asymmetric_range_holds_zero(table):
    x = np.float32([[3, 4, 5, 6], [-3, -4, -5, -6], [0, 0, 0, 0], [2, 2, 2, 2]])
    codes, scales, zeros = _C.quantize(x, symmetric=False)
    assert zeros[:, 0].tolist() == [0, 15, 0, 0]
    assert scales[2, 0] == 0
    assert not codes[2].any()
    error = np.abs(_C.dequantize(codes, scales, zeros) - x)
    assert (error <= scales / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_tiny_rows_become_zero(table, symmetric):
    tiny = np.finfo(np.float32).tiny
    x = np.float32([[0, -0.0, 0], [tiny / 4, -tiny / 8, 0], [tiny * 300, 0, 0]])
    codes, scales, _ = _C.quantize(x, symmetric=symmetric, search=True)
    assert scales[:2].tolist() == [[0], [0]]
    assert not codes[:2].any()
    assert scales[2, 0] >= tiny
    assert codes[2].any()


@pytest.mark.parametrize("group", [0, 128, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_never_raises_the_error(table, group, symmetric):
    x = np.random.default_rng(5).standard_t(3, (64, 256)).astype(np.float32)

    def errors(search):
        parts = _C.quantize(x, 4, group, symmetric, search=search)
        error = (_C.dequantize(*parts).astype(np.float64) - x) ** 2
        return error.reshape(64, -1, group or 256).sum(2)

    plain, searched = errors(False), errors(True)
    assert (searched <= plain * (1 + 1e-6)).all()
    assert searched.sum() < 0.97 * plain.sum()


def test_quantize_does_not_depend_on_threads():
    x = np.random.default_rng(6).standard_normal((300, 512)).astype(np.float32)
    before, results = _C.get_num_threads(), []
    for threads in (1, 2, 5):
        _C.set_num_threads(threads)
        results.append(_C.quantize(x, 4, 128, True, 0.9, True))
    _C.set_num_threads(before)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 5, 8, 70])
def test_quantize_rejects_nonfinite(table, bad, position):
    x = np.ones((3, 71), np.float32)
    x[1, position] = bad
    for symmetric in (True, False):
        with pytest.raises(ValueError, match="x: NaN or Inf found"):
            _C.quantize(x, symmetric=symmetric)


def test_quantize_largest_floats_do_not_overflow(table):
    big = np.finfo(np.float32).max
    x = np.float32([[big, -big, big / 3]])
    for symmetric in (True, False):
        found = _C.quantize(x, 8, symmetric=symmetric)
        assert_same(found, reference.quantize(x, 8, symmetric=symmetric))
        assert np.isfinite(found[1]).all()


def test_quantize_error_texts():
    x = np.ones((2, 6), np.float32)
    with pytest.raises(ValueError, match="bits: expected 4, 5, 6 or 8, got 7"):
        _C.quantize(x, 7)
    with pytest.raises(ValueError, match="group: expected 0 or a divisor of k = 6, got 4"):
        _C.quantize(x, group=4)
    with pytest.raises(ValueError, match="group: expected 0 or a divisor of k = 6, got -1"):
        _C.quantize(x, group=-1)
    for clip in (0.0, -1.0, 1.5, np.nan):
        with pytest.raises(ValueError, match="clip: expected 0 < clip <= 1"):
            _C.quantize(x, clip=clip)
    with pytest.raises(ValueError, match="x: expected 2 dimensions, got 1"):
        _C.quantize(x[0])
    with pytest.raises(ValueError, match="x: expected k >= 1, got 0"):
        _C.quantize(x[:, :0])
    with pytest.raises(TypeError, match="x: expected an array"):
        _C.quantize(np.array([["a"]]))


def test_quantize_takes_lists_strides_and_empty_batches():
    x = np.random.default_rng(7).standard_normal((6, 12)).astype(np.float32)
    assert_same(_C.quantize(x[::2, ::3]), reference.quantize(x[::2, ::3]))
    assert_same(_C.quantize(x.tolist()), reference.quantize(x))
    assert_same(_C.quantize(x.astype(">f4")), reference.quantize(x))
    assert _C.quantize(x[:0])[0].shape == (0, 12)


def test_quantize_leaves_its_input_alone():
    x = np.random.default_rng(8).standard_normal((4, 64)).astype(np.float32)
    copy = x.copy()
    x.flags.writeable = False
    _C.quantize(x, search=True)
    np.testing.assert_array_equal(x, copy)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_equals_twin(bits, symmetric):
    x = np.random.default_rng(9).standard_normal((5, 66)).astype(np.float32)
    parts = _C.quantize(x, bits, 33, symmetric)
    np.testing.assert_array_equal(_C.dequantize(*parts), reference.dequantize(*parts))
    assert np.abs(_C.dequantize(*parts) - x).max() <= parts[1].max() * 0.5001


def test_dequantize_error_texts():
    codes, scales = np.zeros((2, 6), np.int8), np.ones((2, 1), np.float32)
    with pytest.raises(ValueError, match=r"scales: expected shape\[0\] = 2, got 3"):
        _C.dequantize(codes, np.ones((3, 1)))
    with pytest.raises(ValueError, match=r"scales: expected shape\[1\] to divide k = 6, got 4"):
        _C.dequantize(codes, np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"zeros: expected shape\[1\] = 1, got 2"):
        _C.dequantize(codes, scales, np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="zeros: a value is out of range"):
        _C.dequantize(codes, scales, np.full((2, 1), 256))
    with pytest.raises(TypeError, match="codes: expected an array"):
        _C.dequantize(codes.astype(np.int64), scales)


# ---- the clip search against the exact one ------------------------------------------------------


def rows_of(kind, n, k, seed=0):
    rng = np.random.default_rng([seed, k])
    x = {
        "gauss": lambda: rng.standard_normal((n, k)),
        "laplace": lambda: rng.laplace(size=(n, k)),
        "student": lambda: rng.standard_t(3, (n, k)),
        "massive": lambda: rng.standard_normal((n, k)) * np.where(np.arange(k) == 1, 100, 1),
        "ties": lambda: rng.integers(-6, 7, (n, k)),
        "lopsided": lambda: -np.abs(rng.standard_normal((n, k))),
    }[kind]()
    return x.astype(np.float32)


def squared_errors(x, codes, scales):
    """Per row of x, in float64."""
    return ((_C.dequantize(codes, scales).astype(np.float64) - x) ** 2).sum(axis=1)


@pytest.mark.parametrize("group", [0, 128, 64, 32])
@pytest.mark.parametrize("kind", ["gauss", "laplace", "student", "massive", "ties", "lopsided"])
def test_search_chooses_as_the_exact_one_does(kind, group):
    x = rows_of(kind, 16, 1024)
    codes, scales, _ = _C.quantize(x, 4, group, search=True)
    exact = reference.quantize(x, 4, group, search="exact")
    found, least = squared_errors(x, codes, scales), squared_errors(x, *exact[:2])
    assert (found <= least * 1.001).all()
    assert (scales == exact[1]).mean() > 0.999
    assert least.sum() < squared_errors(x, *_C.quantize(x, 4, group)[:2]).sum() or kind == "ties"


@pytest.mark.parametrize("k", [1, 15, 16, 17, 511, 512, 513, 1024, 40000])
@pytest.mark.parametrize("index", [0, 17, 40])
def test_search_sums_its_blocks_without_overflow(table, k, index):
    """At the peak with the smallest step the error is the largest there is: 8120 squared."""
    peak, step = 10150, 29 * (50 - index)
    for u, codes in ((peak, 7), (-peak, 8)):
        errors, clipped = _C.kernel_fixed_errors(np.full(k, u, np.int16), index)
        nearest = min(codes, round(peak / step))
        assert errors == [k * (peak - step * nearest) ** 2] * 4
        assert clipped == k * max(0, peak - step * codes) ** 2


def test_fixed_errors_equal_twin(table):
    part = rows_of("student", 1, 301)[0]
    u = np.rint(part * (np.float32(10150) / np.abs(part).max())).astype(np.int16)
    expected = reference.fixed_errors(part)
    assert [_C.kernel_fixed_errors(u, i)[0][3] for i in range(41)] == expected
    bounds = [_C.kernel_fixed_errors(u, i)[1] for i in range(41)]
    assert all(max(bounds[: i + 1]) <= expected[i] for i in range(41))


def test_search_of_constants_and_zeros_is_exact(table):
    x = np.float32([[0] * 9, [3] * 9, [-3] * 9, [0] * 8 + [5]])
    codes, scales, _ = _C.quantize(x, search=True)
    assert not codes[0].any()
    assert scales[0, 0] == 0
    error = squared_errors(x, codes, scales)
    exact = squared_errors(x, *reference.quantize(x, search="exact")[:2])
    assert (error <= exact + 1e-10).all()


@pytest.mark.parametrize("magnitude", [1e-37, 9e-31, 1.1e-30, 3e38])
def test_search_at_the_ends_of_float32_equals_twin(table, magnitude):
    x = (rows_of("gauss", 3, 77) / 8 * np.float32(magnitude)).astype(np.float32)
    assert_same(_C.quantize(x, search=True), reference.quantize(x, search=True))
