"""Factor sizes, Hadamard matrices and their fast transform."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from singlequant import _C, _reference as reference

SIZES = {
    1: (1, 1), 2: (1, 2), 3: (3, 1), 97: (97, 1), 512: (16, 32), 768: (24, 32), 1408: (44, 32),
    4096: (64, 64), 5120: (80, 64), 8192: (64, 128), 11008: (86, 128), 13824: (108, 128),
    14336: (112, 128), 28672: (224, 128), 29568: (231, 128),
}  # fmt: skip
HUGE = [2**62, 2**63 - 1, 2**61 - 1, 3 * 2**61, 5 * 2**60, 15 * 2**59]
TRANSFORM_SIZES = [*range(1, 65), 86, 88, 108, 112, 172, 176, 224, 231, 255, 256, 344, 1009, 1408]


@pytest.fixture
def threads():
    """Runs a function under a number of threads, then restores it."""
    before = _C.get_num_threads()

    def run(count, function):
        _C.set_num_threads(count)
        return function()

    yield run
    _C.set_num_threads(before)


@pytest.mark.parametrize("k", SIZES)
def test_factor_sizes_match_known_models(k):
    assert _C.factor_sizes(k) == SIZES[k]


@given(st.integers(1, 10**7))
def test_factor_sizes_multiply_to_k_and_match_the_search(k):
    k1, k2 = _C.factor_sizes(k)
    assert k1 * k2 == k
    while k2 % 2 == 0:
        k2 //= 2
    assert k2 in (1, 3, 5)
    assert _C.factor_sizes(k) == reference.factor_sizes(k)


@pytest.mark.parametrize("k", HUGE)
def test_factor_sizes_answer_for_huge_k(k):
    k1, k2 = _C.factor_sizes(k)
    assert k1 * k2 == k
    assert (k1, k2) == reference.factor_sizes(k)


def test_factor_sizes_use_twelve_or_twenty_only_where_they_halve():
    threes = fives = 0
    for k in range(1, 5000):
        k1, k2 = _C.factor_sizes(k)
        plain = min(max(2**i, k // 2**i) for i in range(13) if k % 2**i == 0)
        if k2 & (k2 - 1):
            assert 2 * max(k1, k2) <= plain
            threes += k2 % 3 == 0
            fives += k2 % 5 == 0
        else:
            assert max(k1, k2) == plain
    assert threes
    assert fives


@pytest.mark.parametrize("k", [0, -1, -(2**63)])
def test_factor_sizes_reject_what_is_not_positive(k):
    with pytest.raises(ValueError, match=f"k: expected at least 1, got {k}"):
        _C.factor_sizes(k)


def test_hadamard_matrix_is_orthonormal_and_near_flat_for_every_order():
    for n in [*range(1, 301), 344, 688, 1009, 1408]:
        h = _C.hadamard_matrix(n)
        assert np.abs(h @ h.T - np.eye(n)).max() < 1e-12, n
        assert np.abs(h).max() * np.sqrt(n) < np.sqrt(2) + 1e-12, n


def test_hadamard_matrix_matches_the_reference():
    for n in [*range(1, 301), 1009]:
        difference = np.abs(_C.hadamard_matrix(n) - reference.hadamard_matrix(n)).max()
        assert difference < 1e-12, n


@pytest.mark.parametrize("n", [1, 2, 8, 12, 20, 24, 28, 36, 40, 44, 48, 60, 108, 112, 176, 224])
def test_hadamard_matrix_is_flat_where_sylvester_or_paley_exists(n):
    h = _C.hadamard_matrix(n) * np.sqrt(n)
    np.testing.assert_allclose(np.abs(h), 1, atol=1e-12)


@pytest.mark.parametrize("n", [0, -3, 2**31])
def test_hadamard_matrix_rejects_orders_out_of_range(n):
    with pytest.raises(ValueError, match="n: expected 1 to"):
        _C.hadamard_matrix(n)


@pytest.mark.parametrize("n", TRANSFORM_SIZES)
def test_hadamard_transform_equals_the_matrix(n):
    x = np.random.default_rng(n).standard_normal((2, 3, n))
    before = x.copy()
    y = _C.hadamard_transform(x)
    assert y.shape == x.shape
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, x @ _C.hadamard_matrix(n).T, atol=1e-12)
    np.testing.assert_allclose(y, reference.hadamard_transform(x), atol=1e-12)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("n", [4099, 11008, 14336, 29568, 2**17])
def test_hadamard_transform_keeps_inner_products_of_large_orders(n):
    x = np.random.default_rng(0).standard_normal((3, n)) / np.sqrt(n)
    y = _C.hadamard_transform(x)
    assert not np.allclose(x, y)
    np.testing.assert_allclose(y @ y.T, x @ x.T, atol=1e-12)


@pytest.mark.parametrize("n", [96, 128])
def test_hadamard_transform_is_the_same_for_one_and_two_threads(n, threads):
    x = np.random.default_rng(1).standard_normal((1000, n))
    one, two = (threads(count, lambda: _C.hadamard_transform(x).tobytes()) for count in (1, 2))
    assert one == two


def test_hadamard_transform_takes_lists_strides_swapped_bytes_and_no_rows():
    np.testing.assert_allclose(_C.hadamard_transform([1, 0]), [np.sqrt(0.5)] * 2)
    assert _C.hadamard_transform(np.zeros((0, 6))).shape == (0, 6)
    x = np.arange(48.0).reshape(4, 12)[:, ::2]
    expected = _C.hadamard_transform(np.ascontiguousarray(x))
    for other in (x, x.astype(">f8"), x.astype(np.float32)):
        np.testing.assert_array_equal(_C.hadamard_transform(other), expected)


@pytest.mark.parametrize("x", [3.0, np.zeros((4, 0))])
def test_hadamard_transform_rejects_a_missing_axis(x):
    with pytest.raises(ValueError, match="x: expected"):
        _C.hadamard_transform(x)
