"""Streaming statistics: extremes, sums of squares; the Gram matrix of an axis."""

import numpy as np
import pytest

from singlequant import _C, _reference as reference

SHAPES = [(1, 1, 1), (3, 1, 7), (3, 7, 1), (5, 4, 4), (17, 5, 8), (2, 43, 6), (700, 9, 10)]


def tokens(m, k, seed=0):
    return np.random.default_rng(seed).standard_t(4, (m, k)).astype(np.float32)


def same_bytes(a, b):
    pairs = zip(a[1:], b[1:], strict=True)
    return a[0] == b[0] and all(p.tobytes() == q.tobytes() for p, q in pairs)


def assert_close(found, expected):
    assert found[0] == expected[0]
    for p, q in zip(found[1:], expected[1:], strict=True):
        assert p.dtype == np.float64
        assert p.shape == q.shape
        np.testing.assert_allclose(p, q, rtol=1e-12, atol=1e-12 * np.abs(q).max(initial=0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_update_matches_the_reference(shape):
    m, k = shape[0], shape[1] * shape[2]
    x, more = tokens(m, k), tokens(m + 1, k, 1)
    state, expected = _C.statistics_update(x), reference.statistics_update(x)
    assert_close(state, expected)
    assert_close(
        _C.statistics_update(more, state), reference.statistics_update(more, expected)
    )


@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 2)], ids=str)
def test_axis_gram_matches_the_reference_and_is_symmetric(shape):
    m, k1, k2 = shape
    gram = _C.axis_gram(tokens(m, k1 * k2), k1, k2)
    assert_close((0, gram), (0, reference.axis_gram(tokens(m, k1 * k2), k1, k2)))
    np.testing.assert_array_equal(gram, gram.T)


def test_statistics_update_does_not_depend_on_how_tokens_are_cut():
    x = tokens(1500, 60)
    whole = _C.statistics_update(x)
    state = None
    for part in np.array_split(x, [1, 2, 700, 700, 1499]):
        state = _C.statistics_update(part, state)
    assert same_bytes(whole, state)


def test_statistics_update_is_the_same_for_one_and_two_threads():
    x = tokens(300, 43 * 64)
    before = _C.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            _C.set_num_threads(count)
            results.append((*_C.statistics_update(x), _C.axis_gram(x, 43, 64)))
    finally:
        _C.set_num_threads(before)
    assert same_bytes(*results)


def test_statistics_of_nothing_are_zero_and_take_the_first_extremes():
    empty = _C.statistics_update(np.zeros((0, 6), np.float32))
    assert empty[0] == 0
    assert all(not a.any() for a in empty[1:])
    for value in (5, -5):
        state = _C.statistics_update(np.full((2, 6), value, np.float32), empty)
        np.testing.assert_array_equal(state[1], value)
        np.testing.assert_array_equal(state[2], value)
        assert same_bytes(_C.statistics_merge(empty, state), state)
        assert same_bytes(_C.statistics_merge(state, empty), state)


def test_statistics_merge_matches_the_reference():
    a = _C.statistics_update(tokens(20, 24))
    b = _C.statistics_update(tokens(30, 24, 1) * 3)
    assert_close(_C.statistics_merge(a, b), reference.statistics_merge(a, b))


def test_statistics_hold_the_square_of_the_largest_float():
    largest = np.finfo(np.float32).max
    state = _C.statistics_update(np.full((2, 1), largest))
    assert state[3][0] == 2 * float(largest) ** 2


def test_statistics_leave_their_inputs_untouched():
    x = tokens(4, 6)
    state = _C.statistics_update(x)
    kept = [x.copy(), *(np.copy(a) for a in state[1:])]
    after = _C.statistics_update(x, state)
    merged = _C.statistics_merge(state, after)
    for a, b in zip([x, *state[1:]], kept, strict=True):
        np.testing.assert_array_equal(a, b)
    for result in (after, merged):
        for a in result[1:]:
            assert not any(np.shares_memory(a, b) for b in [x, *state[1:]])


def test_statistics_update_takes_lists_strides_and_swapped_bytes():
    x = tokens(6, 8)
    expected = _C.statistics_update(x)
    wide = np.zeros((6, 16), np.float32)
    wide[:, ::2] = x
    for other in (x.tolist(), wide[:, ::2], x.astype(">f4"), np.asfortranarray(x)):
        assert same_bytes(_C.statistics_update(other), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 5000, -1])
def test_statistics_reject_nonfinite_tokens(bad, at):
    x = tokens(1000, 6)
    x.flat[at] = bad
    with pytest.raises(ValueError, match="x: NaN or Inf"):
        _C.statistics_update(x)
    with pytest.raises(ValueError, match="x: NaN or Inf"):
        _C.axis_gram(x, 2, 3)


def test_statistics_errors_name_the_argument():
    x = tokens(2, 6)
    state = _C.statistics_update(x)
    with pytest.raises(ValueError, match="x: expected k >= 1, got 0"):
        _C.statistics_update(np.zeros((2, 0)))
    with pytest.raises(ValueError, match=r"x: expected shape\[1\] = 6, got 8"):
        _C.statistics_update(tokens(2, 8), state)
    with pytest.raises(ValueError, match=r"state.sum2: expected shape\[0\] = 6, got 5"):
        _C.statistics_update(x, (*state[:3], np.zeros(5)))
    with pytest.raises(ValueError, match="a.count: expected at least 0, got -1"):
        _C.statistics_merge((-1, *state[1:]), state)
    with pytest.raises(TypeError, match="b: expected a tuple of 4"):
        _C.statistics_merge(state, state[:3])
    with pytest.raises(ValueError, match="b: expected k = 6, got 8"):
        _C.statistics_merge(state, _C.statistics_update(tokens(2, 8)))
    with pytest.raises(TypeError, match="x: expected an array"):
        _C.statistics_update(x.astype(complex))


def test_axis_gram_errors_name_the_argument():
    x = tokens(2, 6)
    with pytest.raises(ValueError, match=r"x: expected shape\[1\] = 8, got 6"):
        _C.axis_gram(x, 2, 4)
    with pytest.raises(ValueError, match="k1: expected 1 to .*, got 0"):
        _C.axis_gram(x, 0, 4)
    with pytest.raises(ValueError, match="k2: expected 1 to .*, got -4"):
        _C.axis_gram(x, 1, -4)
