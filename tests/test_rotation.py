"""The type Rotation: what it refuses, keeps and shares."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from singlequant import _C, _reference as reference

EYES = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
NO_PAIRS = (np.zeros((0, 2), np.int32), np.zeros(0))


def orthogonal(n, seed=0):
    return _C.random_orthogonal(n, seed).astype(np.float32)


def chain(n, steps=5, seed=0):
    rng = np.random.default_rng(seed)
    pairs = [rng.choice(n, 2, replace=False) for _ in range(steps)]
    return n, True, np.array(pairs, np.int32), rng.uniform(-3, 3, steps)


def kinds():
    blocks = np.stack([orthogonal(12, seed) for seed in range(4)])
    return [
        _C.Rotation(48),
        _C.Rotation(48, orthogonal(6)),
        _C.Rotation(48, None, orthogonal(6)),
        _C.Rotation(48, orthogonal(6), orthogonal(8)),
        _C.Rotation(48, chain(6), orthogonal(8)),
        _C.Rotation(48, orthogonal(6), chain(8)),
        _C.Rotation(48, right=chain(8)),
        _C.Rotation.blocks(blocks, np.random.default_rng(0).permutation(48), blocks[::-1]),
        _C.Rotation(48, orthogonal(6), align=blocks),
        _C.Rotation(48, orthogonal(6), orthogonal(8), blocks),
        _C.Rotation(48, None, chain(8), blocks),
        _C.Rotation(48, orthogonal(3), (16, True, *NO_PAIRS)),
        _C.Rotation(48, (16, True, *NO_PAIRS), orthogonal(3)),
        _C.Rotation(48, None, (8, True, *NO_PAIRS), blocks),
        _C.Rotation(48, align=blocks),
    ]


@pytest.mark.parametrize("rotation", kinds(), ids=repr)
def test_rotate_equals_its_twin_and_keeps_lengths(rotation):
    x = np.random.default_rng(1).standard_normal((3, 5, 48)).astype(np.float32)
    y = _C.rotate(x, rotation)
    np.testing.assert_allclose(y, reference.rotate(x, rotation), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 16, 32, 128, 1024, 4096])
def test_a_fast_hadamard_has_the_same_bits_on_every_table(table, order):
    """And at every number of rows. Its error is that of a few sums in float32."""
    x = np.random.default_rng(order).standard_normal((5, 3 * order)).astype(np.float32)
    fast = order, True, *NO_PAIRS
    exact = _C.hadamard_transform(x.reshape(-1, order).astype(np.float64)).reshape(x.shape)
    mixed = x.reshape(5, order, 3).transpose(0, 2, 1)
    turned = _C.hadamard_transform(mixed.reshape(-1, order).astype(np.float64)).reshape(5, 3, order)
    for rotation, expected in ((_C.Rotation(3 * order, None, fast), exact),
                               (_C.Rotation(3 * order, fast),
                                turned.transpose(0, 2, 1).reshape(x.shape))):
        found = _C.rotate(x, rotation)
        np.testing.assert_allclose(found, expected, atol=2e-6)
        one = [_C.rotate(row[None], rotation)[0] for row in x]
        np.testing.assert_array_equal(found, one)
        _C.use_kernels("generic")
        np.testing.assert_array_equal(found, _C.rotate(x, rotation))
        _C.use_kernels(table)


def test_rotation_says_what_it_is():
    kronecker = _C.Rotation(48, orthogonal(6))
    assert (kronecker.k, kronecker.kind, kronecker.sizes) == (48, "kronecker", (6, 8))
    assert _C.Rotation(48, None, orthogonal(6)).sizes == (8, 6)
    assert _C.Rotation(48).sizes == (1, 48)
    blocks = _C.Rotation.blocks(EYES, np.arange(8), EYES)
    assert (blocks.k, blocks.kind, blocks.sizes) == (8, "blocks", (2, 4))
    assert repr(kronecker) == "Rotation(kronecker, 6 x 8)"
    assert repr(blocks) == "Rotation(blocks, 2 x 4)"


def test_parts_are_what_was_given():
    left, right = orthogonal(6), chain(8)
    found, (order, hadamard, pairs, angles) = _C.Rotation(48, left, right).parts
    np.testing.assert_array_equal(found, left)
    assert (order, hadamard) == (8, True)
    np.testing.assert_array_equal(pairs, right[2])
    np.testing.assert_array_equal(angles, right[3])
    assert _C.Rotation(48).parts == (None, None)
    for part, given in zip(_C.Rotation.blocks(EYES, np.arange(8), EYES).parts,
                           (EYES, np.arange(8), EYES), strict=True):
        np.testing.assert_array_equal(part, given)


@pytest.mark.parametrize("rotation", kinds()[1:], ids=repr)
def test_rotation_can_be_made_of_its_own_parts(rotation):
    make = _C.Rotation.blocks if rotation.kind == "blocks" else lambda *p: _C.Rotation(48, *p)
    x = np.random.default_rng(1).standard_normal((3, 48)).astype(np.float32)
    np.testing.assert_array_equal(_C.rotate(x, make(*rotation.parts)), _C.rotate(x, rotation))


MANY = np.repeat([[0, 1]], 3, 0)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((0,), ValueError, "k: expected 1 to 2147483647, got 0"),
    ((2**31,), ValueError, "k: expected 1 to 2147483647, got 2147483648"),
    ((6, np.zeros((2, 3))), ValueError, r"left: expected a square matrix, got \(2, 3\)"),
    ((6, np.zeros((0, 0))), ValueError, r"left: expected a square matrix, got \(0, 0\)"),
    ((6, None, np.zeros(3)), ValueError, "right: expected 2 dimensions, got 1"),
    ((6, np.eye(2, dtype=complex)), TypeError, "left: expected an array of"),
    ((6, 1.01 * np.eye(2)), ValueError, r"left: expected an orthogonal .* got \|M M\^T - I\| = 0"),
    ((6, None, np.ones((3, 3))), ValueError, r"right: .*orthogonal .* \|M M\^T - I\| = 3"),
    ((4, np.full((2, 2), np.nan)), ValueError, r"left: .*\|M M\^T - I\| = nan"),
    ((4, np.full((2, 2), 1e30)), ValueError, r"left: .*\|M M\^T - I\| = (inf|nan)"),
    ((6, np.eye(4)), ValueError, "left: expected an order that divides k = 6, got 4"),
    ((6, None, np.eye(4)), ValueError, "right: expected an order that divides k = 6, got 4"),
    ((8, np.eye(2), np.eye(2)), ValueError, r"left, right: .* k1 \* k2 = k = 8, got 2 \* 2"),
    ((6, (3, True)), ValueError, r"left: expected \(order, hadamard, pairs, angles\), got a tuple"),
    ((6, None, (0, True, *NO_PAIRS)), ValueError, "right: expected an order of 1 to .*, got 0"),
    ((6, (2, False, [[0, 2]], [0.1])), ValueError,
     r"left: expected two different indices below 2, got \(0, 2\) at step 0"),
    ((6, (2, False, [[0, 1], [1, 1]], [0.1, 0])), ValueError, r"left: .*got \(1, 1\) at step 1"),
    ((6, (2, False, [[0, 1, 1]], [0.1])), ValueError, r"left: expected shape\[1\] = 2, got 3"),
    ((6, (2, False, MANY, [0, 0])), ValueError, "left: expected as many angles as pairs = 3, got"),
    ((6, None, (2, False, MANY, [0, 0, np.inf])), ValueError,
     "right: expected finite angles, got NaN or Inf at step 2"),
])
def test_kronecker_rotation_names_what_it_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        _C.Rotation(*arguments)


@pytest.mark.parametrize(("parts", "message"), [
    ((EYES[:, :3], np.arange(8), EYES), "first: expected square blocks"),
    ((EYES[:0], np.arange(8), EYES), "first: expected square blocks"),
    ((EYES, np.arange(8), EYES[0]), "second: expected 3 dimensions, got 2"),
    ((EYES, np.arange(8), EYES[:1]), r"second: expected blocks \(2, 4, 4\) as first, got \(1, 4"),
    ((EYES, np.arange(7), EYES), r"permutation: expected shape\[0\] = 8, got 7"),
    ((EYES, np.array([0, 1, 2, 3, 4, 5, 6, 6]), EYES), "permutation: .* got 6 out of .* at 7"),
    ((EYES, np.arange(1, 9), EYES), "permutation: expected each of 0 to 7 once, got 8"),
    ((EYES, np.arange(-1, 7), EYES), "permutation: expected each of 0 to 7 once, got -1"),
    ((0 * EYES, np.arange(8), EYES), r"first: expected an orthogonal .*\|M M\^T - I\| = 1"),
    ((EYES, np.arange(8), np.concatenate([EYES[:1], 2 * EYES[:1]])), "second: .* = 3"),
])
def test_block_rotation_names_what_it_refuses(parts, message):
    with pytest.raises(ValueError, match=message):
        _C.Rotation.blocks(*parts)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("threads", [1, 3])
def test_one_row_that_is_not_orthogonal_is_found_wherever_it_stands(n, threads):
    before = _C.get_num_threads()
    _C.set_num_threads(threads)
    try:
        _C.Rotation(n, orthogonal(n))
        for row in {0, n // 2, n - 1}:
            for wrong in (1.001, np.nan):
                matrix = orthogonal(n)
                matrix[row] *= wrong
                with pytest.raises(ValueError, match="left: expected an orthogonal matrix"):
                    _C.Rotation(n, matrix)
    finally:
        _C.set_num_threads(before)


def test_a_permuted_row_passes_and_a_repeated_one_does_not():
    matrix = orthogonal(130)[::-1].copy()
    _C.Rotation(130, matrix)
    matrix[129] = matrix[3]
    with pytest.raises(ValueError, match=r"\|M M\^T - I\| = 1"):
        _C.Rotation(130, matrix)


def test_rotation_does_not_change_with_what_it_was_made_of():
    matrix, (order, hadamard, pairs, angles) = orthogonal(6), chain(8)
    blocks, permutation = EYES.copy(), np.arange(8, dtype=np.int32)[::-1].copy()
    rotations = (_C.Rotation(48, matrix, (order, hadamard, pairs, angles)),
                 _C.Rotation.blocks(blocks, permutation, blocks))
    inputs = [np.random.default_rng(0).standard_normal((3, r.k)).astype(np.float32)
              for r in rotations]
    before = [_C.rotate(x, r) for x, r in zip(inputs, rotations, strict=True)]
    for array in (matrix, pairs, angles, blocks, permutation):
        array[:] = 0
    for x, rotation, expected in zip(inputs, rotations, before, strict=True):
        np.testing.assert_array_equal(_C.rotate(x, rotation), expected)


@pytest.mark.parametrize("rotation", kinds(), ids=repr)
def test_nothing_of_a_rotation_can_be_written(rotation):
    for name in ("k", "kind", "sizes", "parts", "other"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(rotation, name, 1)
    with pytest.raises(TypeError):
        type(rotation).k = 1
    for part in rotation.parts:
        for array in part if isinstance(part, tuple) else (part,):
            if isinstance(array, np.ndarray):
                with pytest.raises(ValueError, match="read-only"):
                    array[:] = 0
                with pytest.raises(ValueError, match="WRITEABLE"):
                    array.flags.writeable = True


def test_parts_outlive_their_rotation():
    matrix = orthogonal(6)
    (left, _), expected = _C.Rotation(48, matrix).parts, matrix.copy()
    gc.collect()
    np.testing.assert_array_equal(left, expected)


def test_rotation_gives_its_references_back():
    matrix, pairs, x = orthogonal(6), chain(8), np.ones((2, 48), np.float32)
    watched = [matrix, *pairs[2:], pairs, x]
    before = [sys.getrefcount(a) for a in watched]
    rotation = _C.Rotation(48, matrix, pairs)
    assert [sys.getrefcount(a) for a in watched] == before  # it copies
    count = sys.getrefcount(rotation)
    for _ in range(3):
        _C.rotate(x, rotation)
        with pytest.raises(ValueError, match="x: expected"):
            _C.rotate(x[:, :4], rotation)
        with pytest.raises(ValueError, match="left"):
            _C.Rotation(48, 2 * matrix, pairs)
    assert sys.getrefcount(rotation) == count
    parts = rotation.parts
    assert sys.getrefcount(rotation) == count + 3  # each array keeps it
    del parts, rotation
    assert [sys.getrefcount(a) for a in watched] == before


def test_linear_gives_its_rotation_back():
    rotation = _C.Rotation(48, orthogonal(6))
    words = _C.pack(np.zeros((5, 48), np.int8))
    weight = _C.PackedWeight(words, np.ones((5, 1), np.float32), 48)
    x = np.ones((1, 48), np.float32)
    count = sys.getrefcount(rotation)
    _C.linear(x, weight, 4, 1.0, rotation)
    assert sys.getrefcount(rotation) == count


@pytest.mark.parametrize("rotation", kinds(), ids=repr)
def test_rotation_is_shared_by_threads_while_their_number_changes(rotation):
    x = np.random.default_rng(0).standard_normal((300, 48)).astype(np.float32)
    expected, before = _C.rotate(x, rotation).tobytes(), _C.get_num_threads()
    try:
        with ThreadPoolExecutor(3) as pool:
            results = [pool.submit(lambda: _C.rotate(x, rotation).tobytes()) for _ in range(30)]
            for i in range(60):
                _C.set_num_threads(1 + i % 5)
            assert {r.result() for r in results} == {expected}
    finally:
        _C.set_num_threads(before)
