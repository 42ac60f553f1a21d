"""Chains of Givens rotations and the Kronecker application."""

import math

import numpy as np
import pytest

from singlequant import _C, _reference as reference

SEED = 7


def random_chain(rng, n, steps):
    pairs = [rng.choice(n, 2, replace=False) for _ in range(steps)]
    return np.array(pairs, np.int32).reshape(-1, 2), rng.uniform(-np.pi, np.pi, steps)


# ---- chains


def test_chain_apply_follows_the_sign_convention():
    c, s = math.cos(0.3), math.sin(0.3)
    rotated = _C.chain_apply([[0, 2]], [0.3], [1.0, 5.0, 2.0])
    np.testing.assert_allclose(rotated, [c - 2 * s, 5.0, s + 2 * c], atol=1e-15)


@pytest.mark.parametrize(("n", "steps"), [(2, 1), (5, 9), (33, 700)])
def test_chain_apply_matches_the_reference(rng, n, steps):
    pairs, angles = random_chain(rng, n, steps)
    x = rng.standard_normal((150, 2, n))
    before = x.copy()
    y = _C.chain_apply(pairs, angles, x)
    np.testing.assert_allclose(y, reference.chain_apply(pairs, angles, x), atol=1e-12)
    np.testing.assert_array_equal(x, before)


def test_chain_apply_takes_swapped_strided_and_empty_arrays(rng):
    pairs, angles = random_chain(rng, 6, 10)
    x = rng.standard_normal((4, 12))[:, ::2]
    expected = _C.chain_apply(pairs, angles, np.ascontiguousarray(x))
    swapped = _C.chain_apply(pairs.astype(">i8"), angles.astype(">f8"), x.astype(">f8"))
    np.testing.assert_array_equal(swapped, expected)
    assert _C.chain_apply(pairs, angles, np.zeros((0, 6))).shape == (0, 6)
    none = np.zeros((0, 2), np.int32), np.zeros(0)
    np.testing.assert_array_equal(_C.chain_apply(*none, x), x)


def test_chain_apply_is_the_same_for_one_and_two_threads(rng, both_thread_counts):
    pairs, angles = random_chain(rng, 16, 300)
    x = rng.standard_normal((5000, 16))
    one, two = both_thread_counts(lambda: _C.chain_apply(pairs, angles, x).tobytes())
    assert one == two


@pytest.mark.parametrize("pair", [(0, 3), (-1, 0), (1, 1), (0, 2**32 + 1)])
def test_chain_apply_rejects_bad_pairs(pair):
    with pytest.raises(ValueError, match="pairs: "):
        _C.chain_apply(np.array([pair]), [0.1], np.zeros(3))


def test_chain_apply_errors_name_the_argument():
    pairs = np.array([[0, 1]])
    with pytest.raises(ValueError, match=r"angles: expected shape\[0\] = 1, got 2"):
        _C.chain_apply(pairs, [0.1, 0.2], np.zeros(3))
    with pytest.raises(ValueError, match=r"pairs: expected shape\[1\] = 2, got 3"):
        _C.chain_apply([[0, 1, 2]], [0.1], np.zeros(3))
    with pytest.raises(ValueError, match="angles: NaN or Inf"):
        _C.chain_apply(pairs, [np.nan], np.zeros(3))
    with pytest.raises(TypeError, match="pairs: expected an array"):
        _C.chain_apply([[0.0, 1.0]], [0.1], np.zeros(3))
    with pytest.raises(ValueError, match="x: expected"):
        _C.chain_apply(pairs, [0.1], 1.0)


# ---- Kronecker application


def rotate(x, left, right):
    return _C.rotate(x, _C.Rotation(np.shape(x)[-1], left, right))


def rotate_reference(x, left, right):
    return reference.rotate(x, reference.Rotation(np.shape(x)[-1], left, right))


def orthogonal(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32)


@pytest.mark.parametrize("m", [1, 3, 65])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 8), (7, 1), (3, 5), (43, 32), (86, 128)], ids=str)
def test_rotate_equals_the_dense_product(rng, sizes, m):
    k1, k2 = sizes
    left, right = orthogonal(rng, k1), orthogonal(rng, k2)
    x = rng.standard_normal((m, k1 * k2)).astype(np.float32)
    before = x.copy()
    y = rotate(x, left, right)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, rotate_reference(x, left, right), atol=1e-5)
    np.testing.assert_array_equal(x, before)
    if k1 * k2 <= 64:
        kron = np.kron(left.astype(float).T, right.astype(float).T)
        np.testing.assert_allclose(y, x @ kron, atol=1e-5)


def test_rotate_keeps_a_reflection_of_order_one(rng):
    x = rng.standard_normal((3, 4)).astype(np.float32)
    minus = np.array([[-1.0]])
    np.testing.assert_array_equal(rotate(x, minus, np.eye(4)), -x)
    np.testing.assert_array_equal(rotate(x, np.eye(4), minus), -x)


@pytest.mark.parametrize("sizes", [(1, 6), (12, 5), (5, 12), (1031, 1), (3, 1024)], ids=str)
@pytest.mark.parametrize("hadamard", [False, True])
def test_rotate_applies_chain_factors(rng, sizes, hadamard):
    k1, k2 = sizes
    left = (k1, hadamard, *random_chain(rng, k1, 2 * k1 if k1 > 1 else 0))
    right = (k2, not hadamard, *random_chain(rng, k2, 2 * k2 if k2 > 1 else 0))
    x = rng.standard_normal((5, k1 * k2)).astype(np.float32)
    y = rotate(x, left, right)
    np.testing.assert_allclose(y, rotate_reference(x, left, right), atol=1e-5)


def test_rotate_mixes_a_chain_and_a_matrix(rng):
    chain = (12, True, *random_chain(rng, 12, 30))
    matrix = orthogonal(rng, 10)
    x = rng.standard_normal((2, 3, 120)).astype(np.float32)
    for left, right in ((chain, matrix), (matrix, chain)):
        y = rotate(x, left, right)
        assert y.shape == x.shape
        np.testing.assert_allclose(y, rotate_reference(x, left, right), atol=1e-5)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "chain"])
@pytest.mark.parametrize("table", _C.kernels()["runnable"])
def test_rotate_of_a_row_depends_on_that_row_alone(rng, both_thread_counts, table, dense):
    active = _C.kernels()["active"]
    left = orthogonal(rng, 12) if dense else (12, True, *random_chain(rng, 12, 20))
    right = orthogonal(rng, 17) if dense else (17, True, *random_chain(rng, 17, 20))
    x = rng.standard_normal((1001, 204)).astype(np.float32)
    _C.use_kernels(table)
    try:
        one, two = both_thread_counts(lambda: rotate(x, left, right))
        single = np.stack([rotate(row, left, right) for row in x[::50]])
    finally:
        _C.use_kernels(active)
    assert one.tobytes() == two.tobytes()
    assert one[::50].tobytes() == single.tobytes()


def test_rotate_takes_lists_strides_swapped_bytes_and_no_rows(rng):
    left, right = orthogonal(rng, 2), orthogonal(rng, 3)
    x = rng.standard_normal((4, 12)).astype(np.float32)[:, ::2]
    expected = rotate(np.ascontiguousarray(x), left, right)
    for other in (x, x.tolist(), x.astype(">f4"), x.astype(np.float64)):
        np.testing.assert_array_equal(rotate(other, left, right), expected)
    np.testing.assert_array_equal(rotate(x, left.tolist(), right.astype(">f4")), expected)
    assert rotate(np.zeros((0, 6)), left, right).shape == (0, 6)


def test_rotate_errors_name_the_argument():
    rotation = _C.Rotation(6)
    with pytest.raises(ValueError, match=r"x: expected shape\[1\] = 6, got 8"):
        _C.rotate(np.zeros((2, 8)), rotation)
    with pytest.raises(ValueError, match=r"x: expected \[..., k\], got 0 dimensions"):
        _C.rotate(1.0, rotation)
    for other in (None, (np.eye(2), np.eye(3))):
        with pytest.raises(TypeError, match="Rotation"):
            _C.rotate(np.zeros((2, 6)), other)


FUNCTIONS = [
    "factor_sizes",
    "givens_angle",
    "hadamard_matrix",
    "hadamard_transform",
    "chain_apply",
    "art_extremes",
    "art_columns",
    "urt",
    "uniformity_sweep",
    "rotate",
    "axis_gram",
    "statistics_update",
    "statistics_merge",
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rotate_functions_have_signatures_and_twins(name):
    function = getattr(_C, name)
    assert function.__text_signature__.startswith("(")
    assert function.__doc__
    assert callable(getattr(reference, name))
