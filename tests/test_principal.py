# SPDX-License-Identifier: Apache-2.0
"""Principal directions, matrices as chains, moments of columns: twins, properties, refusals."""

import ml_dtypes
import numpy as np
import pytest

from singlequant import _C, _reference as reference

ORDERS = [1, 2, 3, 4, 7, 16, 33, 64, 112]


def orthogonal(n, seed=0):
    """Random, of determinant 1."""
    q = np.linalg.qr(np.random.default_rng([n, seed]).standard_normal((n, n)))[0]
    q[-1] *= np.sign(np.linalg.det(q))
    return q


def applied(chain, n):
    """The matrix of a chain: row i of the identity, transformed, is its column i."""
    return _C.chain_apply(*chain, np.eye(n)).T


def under_thread_counts(function):
    results = []
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        results.append([np.asarray(a).tobytes() for a in function()])
    return results


# ---- a matrix as a chain


@pytest.mark.parametrize("n", ORDERS)
def test_chain_from_matrix_applies_the_matrix(n):
    matrix = orthogonal(n)
    chain = _C.chain_from_matrix(matrix)
    assert len(chain[1]) <= n * (n - 1) // 2
    np.testing.assert_allclose(applied(chain, n), matrix, atol=1e-13 * n)
    expected = reference.chain_from_matrix(matrix)
    np.testing.assert_array_equal(chain[0], expected[0])
    np.testing.assert_allclose(chain[1], expected[1], atol=1e-11)
    assert (chain[0].dtype, chain[1].dtype) == (np.int32, np.float64)


@pytest.mark.parametrize("n", ORDERS)
def test_chain_from_matrix_of_determinant_minus_one_negates_the_last_row(n):
    matrix = orthogonal(n)
    matrix[0] *= -1
    expected = matrix.copy()
    expected[-1] *= -1
    np.testing.assert_allclose(applied(_C.chain_from_matrix(matrix), n), expected, atol=1e-13 * n)


@pytest.mark.parametrize("signs", [[-1, -1], [-1, 1, -1], [1, -1, -1, 1], [-1, -1, -1, -1]])
def test_chain_from_matrix_turns_negative_diagonals(signs):
    """Nothing is to be cleared, and yet something is to be done: half turns."""
    matrix = np.diag(np.array(signs, float))
    for chain in (_C.chain_from_matrix(matrix), reference.chain_from_matrix(matrix)):
        np.testing.assert_allclose(applied(chain, len(signs)), matrix, atol=1e-15)


def test_chain_from_matrix_of_the_identity_is_empty():
    pairs, angles = _C.chain_from_matrix(np.eye(6))
    assert pairs.shape == (0, 2)
    assert angles.shape == (0,)


@pytest.mark.parametrize("n", [2, 5, 12])
def test_chain_from_matrix_takes_permutations(n):
    matrix = np.eye(n)[np.random.default_rng(n).permutation(n)]
    matrix[-1] *= np.sign(np.linalg.det(matrix))
    np.testing.assert_allclose(applied(_C.chain_from_matrix(matrix), n), matrix, atol=1e-14)


def test_chain_from_matrix_keeps_its_argument():
    matrix = orthogonal(9)
    kept = matrix.copy()
    _C.chain_from_matrix(matrix)
    np.testing.assert_array_equal(matrix, kept)


@pytest.mark.parametrize("matrix", [
    2 * np.eye(3), np.ones((3, 3)), np.zeros((3, 3)), np.full((3, 3), np.nan),
    np.diag([1, np.inf, 1]), np.eye(3) + 1e-5, np.diag([1, 1, 0.0]),
], ids=["scaled", "ones", "zeros", "nan", "inf", "near", "singular"])  # fmt: skip
def test_chain_from_matrix_refuses_what_is_not_orthogonal(matrix):
    with pytest.raises(ValueError, match=r"^matrix: expected an orthogonal one \(within 1e-6\)$"):
        _C.chain_from_matrix(matrix)


def test_chain_from_matrix_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"matrix: expected shape\[1\] = 3, got 4"):
        _C.chain_from_matrix(np.ones((3, 4)))
    with pytest.raises(ValueError, match="matrix: expected an order from 1 to 4096, got 0"):
        _C.chain_from_matrix(np.ones((0, 0)))
    with pytest.raises(ValueError, match="matrix: expected 2 dimensions"):
        _C.chain_from_matrix(np.ones(4))
    with pytest.raises(TypeError, match="matrix: expected an array"):
        _C.chain_from_matrix(np.eye(3) * 1j)


# ---- principal directions


def gram(n, rank=None, seed=0):
    """Symmetric, positive, eigenvalues over ten decades."""
    rng = np.random.default_rng([n, seed])
    rows = rng.standard_normal((n, rank or 2 * n)) * np.exp(rng.uniform(-6, 6, (n, 1)))
    return rows @ rows.T


@pytest.mark.parametrize("n", ORDERS)
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_principal_directions_diagonalise_with_falling_values(n, rank):
    matrix = gram(n, rank)
    found = _C.principal_directions(matrix)
    scale = np.linalg.norm(matrix)
    np.testing.assert_allclose(found @ found.T, np.eye(n), atol=1e-12)
    turned = found @ matrix @ found.T
    values = np.diag(turned)
    np.testing.assert_allclose(turned, np.diag(values), atol=1e-13 * scale)
    assert (np.diff(values) <= 1e-13 * scale).all()
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[::-1], atol=1e-13 * scale)


@pytest.mark.parametrize("n", [2, 7, 33])
def test_principal_directions_are_the_twins_up_to_sign(n):
    values = np.arange(n, 0, -1.0)  # well apart, so that each direction is determined
    q = orthogonal(n)
    matrix = q.T @ np.diag(values) @ q
    alike = _C.principal_directions(matrix) @ reference.principal_directions(matrix).T
    np.testing.assert_allclose(np.abs(alike), np.eye(n), atol=1e-10)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e150, 1e308])
def test_principal_directions_do_not_depend_on_the_scale(scale):
    matrix = gram(8)
    matrix /= np.abs(matrix).max()
    found = _C.principal_directions(matrix * scale)
    np.testing.assert_allclose(found, _C.principal_directions(matrix), atol=1e-9)


def test_principal_directions_of_a_diagonal_sort_it_and_keep_the_order_of_equals():
    found = _C.principal_directions(np.diag([1.0, 5, 3, 5, 0]))
    np.testing.assert_array_equal(found, np.eye(5)[[1, 3, 2, 0, 4]])
    np.testing.assert_array_equal(_C.principal_directions(np.zeros((4, 4))), np.eye(4))


def test_principal_directions_take_indefinite_matrices():
    q = orthogonal(6)
    values = np.array([4, 2, 1, -1, -3, -9.0])
    found = _C.principal_directions(q.T @ np.diag(values) @ q)
    np.testing.assert_allclose(np.abs(found @ q.T), np.eye(6), atol=1e-12)


def test_principal_directions_do_not_depend_on_threads():
    a, *others = under_thread_counts(lambda: (_C.principal_directions(gram(40)),))
    assert others == [a, a]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_principal_directions_reject_nonfinite(bad):
    for at in ((0, 0), (2, 1), (1, 2)):
        matrix = gram(3)
        matrix[at] = bad
        with pytest.raises(ValueError, match="gram: NaN or Inf found"):
            _C.principal_directions(matrix)


def test_principal_directions_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"gram: expected shape\[1\] = 3, got 4"):
        _C.principal_directions(np.ones((3, 4)))
    with pytest.raises(ValueError, match="gram: expected an order from 1 to 4096, got 0"):
        _C.principal_directions(np.ones((0, 0)))
    with pytest.raises(ValueError, match="gram: expected 2 dimensions"):
        _C.principal_directions(np.ones(4))


# ---- moments of columns


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 63), (7, 64), (5, 65), (33, 200), (0, 9)])
@pytest.mark.usefixtures("table")
def test_column_moments_equal_the_twins(dtype, shape):
    w = np.random.default_rng(shape).standard_normal(shape).astype(dtype)
    largest, squares = _C.column_moments(w)
    expected = reference.column_moments(w.astype(np.float64))
    np.testing.assert_array_equal(largest, expected[0])
    np.testing.assert_allclose(squares, expected[1], rtol=1e-14)
    assert largest.dtype == squares.dtype == np.float64


def test_column_moments_hold_the_square_of_the_largest_float():
    largest, squares = _C.column_moments(np.full((2, 1), -np.finfo(np.float32).max))
    assert largest[0] == np.finfo(np.float32).max
    assert squares[0] == 2 * float(np.finfo(np.float32).max) ** 2


def test_column_moments_do_not_depend_on_threads():
    w = np.random.default_rng(0).standard_normal((50, 1000)).astype(np.float16)
    a, *others = under_thread_counts(lambda: _C.column_moments(w))
    assert others == [a, a]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.usefixtures("table")
def test_column_moments_reject_nonfinite(dtype, bad):
    for at in ((0, 0), (3, 69), (1, 64)):
        w = np.ones((4, 70), dtype)
        w[at] = bad
        with pytest.raises(ValueError, match="weight: NaN or Inf found"):
            _C.column_moments(w)


def test_column_moments_refuse_other_arguments():
    with pytest.raises(ValueError, match="weight: expected at least 1 column, got 0"):
        _C.column_moments(np.ones((3, 0), np.float32))
    with pytest.raises(ValueError, match="weight: expected 2 dimensions"):
        _C.column_moments(np.ones(3, np.float32))
    with pytest.raises(TypeError, match="weight: expected"):
        _C.column_moments(np.ones((3, 3), complex))
