"""Rows of codes, as embedding and head of 8, 6 or 4 bits have them, against their NumPy twins."""

import ml_dtypes
import numpy as np
import pytest

from singlequant import _C, _reference as reference

SEED = 11
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def made(rng, n, k, dtype=np.float32):
    """Rows of very different sizes, one of them zero and one with an outlier."""
    table = rng.standard_t(4, (n, k)) * np.exp(rng.normal(size=(n, 1)))
    table[0] = 0
    table[-1, k // 2] = 40
    return table.astype(dtype)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 31), (7, 32), (4, 33), (3, 130)])
def test_quantize_rows_equals_twin_byte_for_byte(table, rng, bits, dtype, n, k):
    given = made(rng, n, k, dtype)
    for found, expected in zip(_C.quantize_rows(given, bits), reference.quantize_rows(given, bits),
                               strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_quantize_rows_takes_the_smallest_and_largest_floats(rng, bits):
    given = np.array([[1e-45, -1e-45], [1e-38, 3e-38], [3.4e38, -3.4e38]], np.float32)
    for found, expected in zip(_C.quantize_rows(given, bits), reference.quantize_rows(given, bits),
                               strict=True):
        np.testing.assert_array_equal(found, expected)


def error(table, bits):
    wide = reference.rows_of_codes(*_C.quantize_rows(table, bits), bits, table.shape[1])
    return np.sum((wide - table) ** 2) / np.sum(table**2)


def test_rows_of_8_bits_are_within_half_a_step(rng):
    table = made(rng, 9, 77)
    codes, scales = _C.quantize_rows(table, 8)
    step = np.repeat(scales.view(ml_dtypes.bfloat16).astype(float), 32, axis=1)[:, :77]
    # a scale that bfloat16 rounded down by 2^-9 leaves the largest of 127 steps a quarter step out
    wrong = np.abs(reference.rows_of_codes(codes, scales, 8, 77) - table)
    assert (wrong <= 0.5001 * step).all()


def test_turning_a_block_round_makes_4_bits_better(rng):
    table = rng.standard_normal((64, 128)).astype(np.float32)
    scales = _C.quantize_rows(table, 4)[1].view(ml_dtypes.bfloat16).astype(float)
    assert 0.3 < (scales < 0).mean() < 0.7
    codes, plain, _ = _C.quantize(table, 4, 32, True, 1.0, True)
    unturned = np.sum((_C.dequantize(codes, plain) - table) ** 2) / np.sum(table**2)
    assert error(table, 4) < unturned
    assert error(table, 8) < error(table, 6) / 8 < error(table, 4) / 80


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_rows_do_not_depend_on_threads_or_neighbours(rng, bits, both_thread_counts):
    table, x = made(rng, 1500, 96), rng.normal(size=(70, 96)).astype(np.float32)

    def run():
        codes, scales = _C.quantize_rows(table, bits)
        return codes.tobytes(), scales.tobytes(), _C.linear_rows(x, codes, scales, bits).tobytes()

    one, two = both_thread_counts(run)
    assert one == two
    codes, scales = _C.quantize_rows(table, bits)
    some = _C.quantize_rows(table[70:75], bits)
    np.testing.assert_array_equal(some[0], codes[70:75])
    whole = _C.linear_rows(x, codes, scales, bits)  # 70 tokens are more than the kernel takes
    np.testing.assert_array_equal(_C.linear_rows(x[65], codes, scales, bits), whole[65])
    assert _C.linear_rows(x[:0], codes, scales, bits).shape == (0, 1500)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_gather_codes_is_exact(table, rng, bits):
    codes, scales = _C.quantize_rows(made(rng, 50, 45), bits)
    index = [0, 49, 7, 7]
    found = _C.gather_codes(codes, scales, bits, 45, index)
    np.testing.assert_array_equal(found,
                                  reference.gather_codes(codes, scales, bits, 45, index))
    wide = reference.rows_of_codes(codes, scales, bits, 45)[index]
    np.testing.assert_array_equal(found.astype(float), wide)


def test_rows_errors_name_the_argument(rng):
    table = made(rng, 4, 40)
    codes, scales = _C.quantize_rows(table, 8)
    x = np.zeros((2, 40), np.float32)
    table[2, 3] = np.nan
    for arguments, message in (
        ((table, 8), r"table, row 2: NaN or Inf found"),
        ((table, 5), "bits: expected 8, 6 or 4, got 5"),
        ((table[:, :0], 4), "table: expected k >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.quantize_rows(*arguments)
    with pytest.raises(TypeError, match="table: expected float32, float16 or bfloat16"):
        _C.quantize_rows(codes, 8)
    for arguments, message in (
        ((x[:, 1:], codes, scales, 8), r"codes: expected shape\[1\] = 39, got 40"),
        ((x, codes, scales[:3], 8), r"scales: expected shape\[0\] = 4, got 3"),
        ((x, codes[:, :32], scales[:, :1], 4), r"scales: expected shape\[1\] = 2, got 1"),
        ((x, codes, scales, 7), "bits: expected 8, 6 or 4, got 7"),
        ((np.float32(0), codes, scales, 8), "x: expected at least 1 dimension"),
        ((x, codes, scales, 8, 4), "activation_bits: expected 8, 16 or 24, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.linear_rows(*arguments)
    with pytest.raises(ValueError, match=r"index\[1\]: expected 0 to 3, got 4"):
        _C.gather_codes(codes, scales, 8, 40, [0, 4])
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        _C.gather_codes(codes, scales, 8, 0, [0])
