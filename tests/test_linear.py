"""The packed linear: exact integer sums on every table, at every odd shape, at the bounds."""

import sys
import threading

import numpy as np
import pytest

from singlequant import _C, _reference as reference

TABLES = _C.kernels()["runnable"]
M = [1, 2, 3, 4, 5, 6, 7, 16, 33]
N = [1, 7, 16, 17, 31, 33, 65]
K = [1, 7, 8, 31, 32, 33, 129, 544, 545, 1088, 1100, 4096]
# 16-bit activations: |error| <= (2 k + 2) eps sum |x w|, the bound of a sequential float32 chain.
EPS = np.finfo(np.float32).eps


def problem(m, n, k, group=0, seed=0):
    rng = np.random.default_rng([m, n, k, seed])
    words = reference.pack(rng.integers(-8, 8, (n, k)))
    scales = rng.uniform(0.5, 2, (n, k // group if group else 1)).astype(np.float32)
    return rng.standard_normal((m, k)).astype(np.float32), words, scales


@pytest.mark.parametrize("k", K)
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_equals_twin_bit_for_bit(table, bits, k):
    for n in N:
        x, words, scales = problem(max(M), n, k)
        expected = reference.packed_linear(x, words, scales, bits=bits)
        weight = _C.PackedWeight(words, scales, k)
        for m in M if k < 4096 or table != "generic" else (3, 16):
            np.testing.assert_array_equal(_C.linear(x[:m], weight, bits), expected[:m])


@pytest.mark.parametrize("k", K)
def test_linear_a16_is_within_the_chain_bound(table, k):
    for n in (1, 17, 33):
        x, words, scales = problem(7, n, k)
        expected = reference.packed_linear(x, words, scales, bits=16)
        magnitude = np.abs(x) @ np.abs(reference.dequantize(reference.unpack(words, k), scales)).T
        found = _C.linear(x, _C.PackedWeight(words, scales, k), 16)
        assert (np.abs(found - expected) <= (2 * k + 2) * EPS * magnitude).all()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("k", "group"), [(32, 32), (96, 32), (512, 64), (1152, 128), (1088, 544)])
def test_linear_groups_equal_twin(table, bits, k, group):
    x, words, scales = problem(5, 35, k, group)
    found = _C.linear(x, _C.PackedWeight(words, scales, k, group), bits, 0.9)
    expected = reference.packed_linear(x, words, scales, group, bits, 0.9)
    if bits == 16:
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    else:
        np.testing.assert_array_equal(found, expected)


# A chain of 16-bit sums holds 136 steps of 4 k at 4 bits (k = 544), 8 steps (k = 32) at 8 bits.
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [28, 32, 36, 64, 540, 544, 548, 576, 1088, 1092, 16416, 70000])
@pytest.mark.parametrize("weight_code", [-8, 7])
def test_linear_worst_case_sums_are_exact(table, bits, k, weight_code):
    lowest = -(2 ** (bits - 1))
    # clip makes everything but one element saturate at the lowest, or the highest, code
    for sign in (-1, 1):
        x = np.full((4, k), sign, np.float32)
        code = lowest if sign < 0 else -lowest - 1
        clip = 0.5
        scale = np.float32(clip) / np.float32(-lowest - 1)
        weight = _C.PackedWeight(_C.pack(np.full((17, k), weight_code)), np.ones(17), k)
        exact = k * weight_code * code
        np.testing.assert_array_equal(
            _C.linear(x, weight, bits, clip), np.full((4, 17), scale * np.float32(exact))
        )


def test_linear_largest_k_is_exact(table):
    k = 2**20
    weight = _C.PackedWeight(np.full((1, k // 8), -1, np.int32), [1.0], k)  # nibbles 15: codes 7
    x = np.full((1, k), -1, np.float32)
    expected = np.float32(0.5) / np.float32(127) * np.float32(-128 * 7 * k)
    assert _C.linear(x, weight, 8, 0.5)[0, 0] == expected


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("n", "k", "group"), [(33, 97, 0), (70, 1088, 0), (64, 512, 64)])
def test_linear_tokens_do_not_depend_on_the_batch(table, bits, n, k, group):
    x, words, scales = problem(75, n, k, group)
    weight = _C.PackedWeight(words, scales, k, group)
    whole = _C.linear(x, weight, bits)
    for m in (1, 2, 3, 4, 5, 6, 7, 9, 74):
        np.testing.assert_array_equal(_C.linear(x[-m:], weight, bits), whole[-m:])
    for i in range(75):
        np.testing.assert_array_equal(_C.linear(x[i], weight, bits), whole[i])


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_linear_outputs_do_not_depend_on_their_neighbours(table, bits):
    x, words, scales = problem(6, 97, 160)
    whole = _C.linear(x, _C.PackedWeight(words, scales, 160), bits)
    for begin, end in ((0, 1), (16, 33), (5, 38), (96, 97)):
        part = _C.PackedWeight(words[begin:end], scales[begin:end], 160)
        np.testing.assert_array_equal(_C.linear(x, part, bits), whole[:, begin:end])


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_linear_does_not_depend_on_threads(table, bits):
    m, n, k = (40, 1100, 512) if table != "generic" else (9, 1100, 256)
    x, words, scales = problem(m, n, k)
    weight = _C.PackedWeight(words, scales, k)
    before, results = _C.get_num_threads(), []
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        results.append(_C.linear(x, weight, bits))
    _C.set_num_threads(before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("bits", [4, 8])
def test_linear_tables_agree_bit_for_bit(bits):
    x, words, scales = problem(9, 40, 1152, 128)
    before, results = _C.kernels()["active"], []
    for name in TABLES:  # packed under one table, multiplied while another is active
        _C.use_kernels(name)
        weight = _C.PackedWeight(words, scales, 1152, 128)
        assert weight.kernels == name
        for other in TABLES:
            _C.use_kernels(other)
            results.append(_C.linear(x, weight, bits, 0.9))
    _C.use_kernels(before)
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_linear_zero_tokens_give_zero(table):
    x, words, scales = problem(3, 20, 64)
    x[1] = 0
    for bits in (4, 8, 16):
        y = _C.linear(x, _C.PackedWeight(words, scales, 64), bits)
        assert not y[1].any()
        assert y[0].all()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_linear_rejects_nonfinite(table, bits, bad):
    x, words, scales = problem(4, 9, 70)
    weight = _C.PackedWeight(words, scales, 70)
    for position in (0, 8, 69):
        broken = x.copy()
        broken[2, position] = bad
        with pytest.raises(ValueError, match="x: NaN or Inf found"):
            _C.linear(broken, weight, bits)


def test_linear_keeps_leading_dimensions():
    x, words, scales = problem(12, 9, 40)
    weight = _C.PackedWeight(words, scales, 40)
    flat = _C.linear(x, weight)
    assert _C.linear(x[0], weight).shape == (9,)
    deep = _C.linear(x.reshape(2, 3, 2, 40), weight)
    np.testing.assert_array_equal(deep, flat.reshape(2, 3, 2, 9))
    assert _C.linear(x[:0], weight).shape == (0, 9)
    assert _C.linear(np.zeros((3, 0, 40), np.float32), weight).shape == (3, 0, 9)
    np.testing.assert_array_equal(_C.linear(np.asfortranarray(x), weight), flat)
    np.testing.assert_array_equal(_C.linear(x.tolist(), weight), flat)


def test_linear_leaves_its_inputs_alone_and_leaks_no_reference():
    x, words, scales = problem(3, 9, 40)
    copy = x.copy()
    x.flags.writeable = False
    weight = _C.PackedWeight(words, scales, 40)
    counts = sys.getrefcount(x), sys.getrefcount(weight)
    for _ in range(10):
        _C.linear(x, weight)
        with pytest.raises(ValueError, match="bits"):
            _C.linear(x, weight, 5)
    assert (sys.getrefcount(x), sys.getrefcount(weight)) == counts
    np.testing.assert_array_equal(x, copy)


def test_linear_error_texts():
    x, words, scales = problem(3, 9, 40)
    weight = _C.PackedWeight(words, scales, 40)
    with pytest.raises(ValueError, match=r"x: expected shape\[1\] = 40, got 39"):
        _C.linear(x[:, :39], weight)
    with pytest.raises(ValueError, match="bits: expected 4, 8 or 16, got 2"):
        _C.linear(x, weight, 2)
    with pytest.raises(ValueError, match="clip: expected 0 < clip <= 1"):
        _C.linear(x, weight, 4, 0.0)
    with pytest.raises(ValueError, match="x: expected at least 1 dimension, got 0"):
        _C.linear(np.float32(1), weight)
    with pytest.raises(TypeError, match="weight: expected a PackedWeight, got int"):
        _C.linear(x, 3)
    with pytest.raises(TypeError, match="x: expected an array"):
        _C.linear(x.astype(complex), weight)


def test_linear_may_be_called_from_many_threads():
    x, words, scales = problem(20, 300, 256)
    weight = _C.PackedWeight(words, scales, 256)
    expected = _C.linear(x, weight)
    results = [None] * 4

    def work(i):
        results[i] = [_C.linear(x, weight) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        for y in result:
            np.testing.assert_array_equal(y, expected)


def orthogonal(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0].astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("m", [1, 3, 17, 130])
def test_linear_rotates_like_rotate_bit_for_bit(table, bits, m):
    k1, k2, blocks = 12, 32, 4
    k = k1 * k2
    x, words, scales = problem(m, 33, k)
    weight = _C.PackedWeight(words, scales, k)
    turn = np.stack([orthogonal(k // blocks, s) for s in range(blocks)])
    deal = np.random.default_rng(0).permutation(k).astype(np.int32)
    chain = (k1, True, np.array([[0, 5], [3, 1]], np.int32), np.array([0.3, -1.0]))
    for rotation in (
        _C.Rotation(k, orthogonal(k1), orthogonal(k2)),
        _C.Rotation(k, chain),
        _C.Rotation.blocks(turn, deal, turn),
        _C.Rotation(k),
        None,
    ):
        rotated = x if rotation is None else _C.rotate(x, rotation)
        np.testing.assert_array_equal(
            _C.linear(x, weight, bits, 0.9, rotation), _C.linear(rotated, weight, bits, 0.9)
        )


@pytest.mark.parametrize(
    ("rotation", "error", "message"),
    [
        (3, TypeError, "rotation: expected a Rotation or None, got int"),
        ((None, None), TypeError, "rotation: expected a Rotation or None, got tuple"),
        (_C.Rotation(48), ValueError, "rotation: expected one of k = 96 inputs, got 48"),
    ],
)
def test_linear_bad_rotation_is_refused(rotation, error, message):
    x, words, scales = problem(2, 3, 96)
    with pytest.raises(error, match=message):
        _C.linear(x, _C.PackedWeight(words, scales, 96), 4, 1.0, rotation)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 9])
def test_linear_rotated_does_not_depend_on_threads(table, m):
    k1, k2 = 48, 64
    x, words, scales = problem(m, 33, k1 * k2)
    weight = _C.PackedWeight(words, scales, k1 * k2)
    rotation = _C.Rotation(k1 * k2, orthogonal(k1), orthogonal(k2))
    before, results = _C.get_num_threads(), []
    for threads in (1, 2, 4):
        _C.set_num_threads(threads)
        results.append(_C.linear(x, weight, 4, 1.0, rotation))
    _C.set_num_threads(before)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("m", [0, 1, 33, 700])  # 700 rows are several chunks
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_linear_adds_a_bias_last(bits, m):
    x, words, scales = problem(m, 65, 129)
    weight = _C.PackedWeight(words, scales, 129)
    bias = np.linspace(-3, 5, 65, dtype=np.float32)
    expected = _C.linear(x, weight, bits) + bias
    for given in (bias, bias.astype(np.float64), bias.tolist()):
        np.testing.assert_array_equal(_C.linear(x, weight, bits, bias=given), expected)


@pytest.mark.parametrize(("bias", "message"), [
    (np.zeros(64), r"bias: expected .*65"), (np.zeros((1, 65)), "bias: expected 1 dimension")])
def test_linear_bias_of_another_shape_is_refused(bias, message):
    x, words, scales = problem(3, 65, 129)
    with pytest.raises(ValueError, match=message):
        _C.linear(x, _C.PackedWeight(words, scales, 129), bias=bias)
