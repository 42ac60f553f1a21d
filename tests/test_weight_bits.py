# SPDX-License-Identifier: Apache-2.0
"""Weights of 5, 6 and 8 bits: the stream of the file, panels of bytes, rounding to such codes."""

import numpy as np
import pytest
from test_kernels import Guarded

from singlequant import _C, _reference as reference

TABLES = _C.kernels()["runnable"]
WIDE = [5, 6, 8]
ALL = [4, *WIDE]
# (k, group, high)
SHAPES = [(1, 0, 0), (31, 0, 0), (33, 0, 32), (129, 0, 0), (544, 32, 64), (1100, 0, 288),
          (512, 128, 128), (192, 96, 96)]  # fmt: skip


def problem(m, n, k, group, bits, seed=0):
    rng = np.random.default_rng([m, n, k, bits, seed])
    half = 2 ** (bits - 1)
    words = _C.pack(rng.integers(-half, half, (n, k)), bits)
    scales = rng.uniform(0.5, 2, (n, k // group if group else 1)).astype(np.float32)
    return rng.standard_normal((m, k)).astype(np.float32), words, scales


# ---- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ALL)
@pytest.mark.parametrize("k", [1, 6, 7, 8, 31, 32, 33, 97, 1000])
def test_words_equal_twin_and_come_back(bits, k):
    half = 2 ** (bits - 1)
    codes = np.random.default_rng(k).integers(-half, half, (5, k)).astype(np.int8)
    words = _C.pack(codes, bits)
    assert words.shape == (5, -(-k * bits // 32))
    np.testing.assert_array_equal(words, reference.pack(codes, bits))
    np.testing.assert_array_equal(_C.unpack(words, k, bits), codes)
    np.testing.assert_array_equal(reference.unpack(words, k, bits), codes)


@pytest.mark.parametrize("bits", ALL)
def test_unpacking_reads_no_byte_behind_the_words(bits):
    """Eight codes come of one read of eight bytes; the last row ends where the memory does."""
    pages, half = Guarded(), 2 ** (bits - 1)
    for k in range(1, 84):
        codes = np.random.default_rng(k).integers(-half, half, (3, k)).astype(np.int8)
        words = pages.place(_C.pack(codes, bits))
        np.testing.assert_array_equal(_C.unpack(words, k, bits), codes)


def test_layout_is_a_stream_of_low_bits_first():
    words = _C.pack([[-16, 15, -16, 15, -16, 15, 1]], 5)
    assert words.view(np.uint32).tolist() == [[0x7E0F83E0, 0x08421084]]
    assert _C.pack([[-128, 127, 0, 1]], 8).view(np.uint32).tolist() == [[0x8180FF00]]


@pytest.mark.parametrize("bits", ALL)
def test_tail_is_code_zero(bits):
    """The words of k codes are the first ones of k codes with codes 0 behind them."""
    codes = np.random.default_rng(0).integers(-8, 8, (3, 40))
    codes[:, 33:] = 0
    short, whole = _C.pack(codes[:, :33], bits), _C.pack(np.pad(codes, ((0, 0), (0, 24))), bits)
    np.testing.assert_array_equal(short, whole[:, : short.shape[1]])


@pytest.mark.parametrize("bits", ALL)
def test_codes_out_of_range_and_other_bits_are_refused(bits):
    half = 2 ** (bits - 1)
    for bad in (half, -half - 1, 300, -300):
        text = f"codes: expected values in {-half} .. {half - 1}, got others"
        with pytest.raises(ValueError, match=text):
            _C.pack(np.array([[0, bad]], np.int64), bits)
    words = np.zeros((2, bits), np.int32)
    with pytest.raises(ValueError, match=rf"words: expected \(n, ceil\(k \* {bits} / 32\)\)"):
        _C.unpack(words, 33, bits)
    for other in (0, 2, 3, 7, 9, 16):
        with pytest.raises(ValueError, match=f"bits: expected 4, 5, 6 or 8, got {other}"):
            _C.PackedWeight(words, np.ones(2), 32, 0, 0, other)
        with pytest.raises(ValueError, match="bits: expected"):
            _C.pack(np.zeros((1, 1), np.int8), other)
        with pytest.raises(ValueError, match="bits: expected"):
            _C.unpack(words, 32, other)


# ---- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDE)
@pytest.mark.parametrize(("k", "group", "high"), SHAPES)
def test_products_equal_twin_bit_for_bit(table, bits, k, group, high):
    for n in (1, 17, 65):
        x, words, scales = problem(33, n, k, group, bits)
        for a_bits, high_inputs in ((8, 0), (4, 0), (4, high)):
            expected = reference.packed_linear(
                x, words, scales, group, a_bits, 0.9, high_inputs, bits
            )
            weight = _C.PackedWeight(words, scales, k, group, high_inputs, bits)
            assert weight.bits == bits
            for m in (1, 2, 3, 5, 6, 7, 12, 33):
                np.testing.assert_array_equal(_C.linear(x[:m], weight, a_bits, 0.9), expected[:m])


@pytest.mark.parametrize("bits", WIDE)
@pytest.mark.parametrize("high", [0, 64])
def test_many_rows_give_the_bits_of_few(table, bits, high):
    """Several blocks of rows meet a chunk of panels, whose codes are made wide once for all."""
    x, words, scales = problem(41, 150, 11072, 0, bits)
    weight = _C.PackedWeight(words, scales, 11072, int8_inputs=high, bits=bits)
    for activation_bits in (4, 8, 16) if not high else (4,):
        whole = _C.linear(x, weight, activation_bits)
        parts = [_C.linear(x[i : i + 7], weight, activation_bits) for i in range(0, len(x), 7)]
        np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("bits", WIDE)
@pytest.mark.parametrize(("k", "group"), [(1, 0), (33, 0), (544, 32), (1100, 0)])
def test_float_activations_are_within_the_chain_bound(table, bits, k, group):
    x, words, scales = problem(15, 35, k, group, bits)
    weight = _C.PackedWeight(words, scales, k, group, 0, bits)
    found = _C.linear(x, weight, 16)
    w = reference.dequantize(reference.unpack(words, k, bits), scales)
    bound = (2 * k + 2) * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(w).T)
    assert (np.abs(found - x.astype(np.float64) @ w.astype(np.float64).T) <= bound).all()
    for m in (1, 2, 5, 13):
        np.testing.assert_array_equal(_C.linear(x[:m], weight, 16), found[:m])


@pytest.mark.parametrize("k", [32, 36, 4096, 2**16])
def test_worst_case_sums_are_exact(table, k):
    """Every product at its largest magnitude, to the longest k: 128 * 128 * 2^16 = 2^30."""
    for code in (-128, 127):
        weight = _C.PackedWeight(_C.pack(np.full((17, k), code), 8), np.ones(17), k, bits=8)
        for sign, level in ((-1, -128), (1, 127)):  # a clip of 0.5: every code saturates
            found = _C.linear(np.full((2, k), sign, np.float32), weight, 8, 0.5)
            scale = np.float32(0.5) / np.float32(127)
            assert (found == scale * np.float32(k * code * level)).all()


@pytest.mark.parametrize("bits", WIDE)
def test_worst_case_sums_of_every_width_are_exact(table, bits):
    """Sums of 16 bits hold the largest codes of 5 and 6 bits, whatever the signs."""
    k = 2**12
    for code in (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1):
        weight = _C.PackedWeight(_C.pack(np.full((17, k), code), bits), np.ones(17), k, bits=bits)
        for sign, level in ((-1, -128), (1, 127)):
            for m in (1, 3, 40):
                found = _C.linear(np.full((m, k), sign, np.float32), weight, 8, 0.5)
                assert (found == np.float32(0.5) / np.float32(127) * np.float32(k * code * level)
                        ).all()


def test_memory_follows_the_bits():
    words = {bits: np.zeros((64, 1024 * bits // 32), np.int32) for bits in ALL}
    sizes = {bits: _C.PackedWeight(w, np.ones(64), 1024, bits=bits).nbytes
             for bits, w in words.items()}
    scales = sizes[8] - 64 * 1024
    assert sizes == {bits: 64 * 1024 * bits // 8 + scales for bits in ALL}


def test_longer_rows_are_refused():
    for bits in WIDE:
        words = np.zeros((1, 2**17 * bits // 32), np.int32)
        with pytest.raises(ValueError, match=f"k: expected k <= 65536 with {bits} bits, got"):
            _C.PackedWeight(words, [1.0], 2**17, bits=bits)


def test_four_bits_stored_as_eight_give_the_same_products(table):
    rng = np.random.default_rng(3)
    codes = rng.integers(-8, 8, (40, 300))
    x, scales = rng.standard_normal((13, 300)).astype(np.float32), rng.uniform(1, 2, 40)
    for a_bits in (4, 8, 16):
        narrow, *others = (
            _C.linear(x, _C.PackedWeight(_C.pack(codes, b), scales, 300, bits=b), a_bits)
            for b in ALL
        )
        for other in others:
            np.testing.assert_array_equal(other, narrow)


def test_weights_made_under_one_table_serve_under_another():
    x, words, scales = problem(9, 40, 544, 32, 6)
    expected = reference.packed_linear(x, words, scales, 32, 4, 0.9, 64, 6)
    for made in TABLES:
        _C.use_kernels(made)
        weight = _C.PackedWeight(words, scales, 544, 32, 64, 6)
        for used in TABLES:
            _C.use_kernels(used)
            np.testing.assert_array_equal(_C.linear(x, weight, 4, 0.9), expected)


def test_tail_bits_of_the_words_are_ignored():
    for bits in WIDE:
        x, words, scales = problem(3, 5, 13, 0, bits)
        dirty = words.view(np.uint32).copy()
        dirty[:, -1] ^= np.uint32(0xFFFFFFFF << (13 * bits % 32) & 0xFFFFFFFF)
        a, b = (_C.linear(x, _C.PackedWeight(w, scales, 13, bits=bits), 8)
                for w in (words, dirty.view(np.int32)))
        np.testing.assert_array_equal(a, b)


# ---- rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ALL)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(("group", "bfloat16"), [(0, False), (32, True)])
def test_rounded_weights_equal_twin(table, bits, search, group, bfloat16):
    x = np.random.default_rng(bits).standard_normal((7, 96)).astype(np.float32)
    given = {"group": group, "search": search, "bits": bits, "bfloat16": bfloat16}
    words, scales = _C.quantize_weight(x, **given)
    twin_words, twin_scales = reference.quantize_weight(x, **given)
    np.testing.assert_array_equal(scales, twin_scales)
    np.testing.assert_array_equal(words, twin_words)
    codes, same, _ = _C.quantize(x, bits, group, True, 1.0, search, bfloat16)
    np.testing.assert_array_equal(_C.unpack(words, 96, bits), codes)
    np.testing.assert_array_equal(same, scales)
    assert not bfloat16 or not (scales.view(np.uint32) & 0xFFFF).any()


def test_each_bit_halves_the_error_of_rounding():
    x = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    gram = _C.gram(np.random.default_rng(2).standard_normal((512, 256)).astype(np.float32))
    factor = _C.gptq_factor(gram)
    for rounding in ("rtn", "mse", "gptq"):
        errors = []
        for bits in ALL:
            if rounding == "gptq":
                codes, scales = _C.gptq_round(x, *factor, bits, 32, True, True)
            else:
                words, scales = _C.quantize_weight(x, 32, rounding == "mse", bits=bits,
                                                   bfloat16=True)
                codes = _C.unpack(words, 256, bits)
            assert codes.min() >= -(2 ** (bits - 1))
            assert codes.max() < 2 ** (bits - 1)
            assert not (scales.view(np.uint32) & 0xFFFF).any()
            errors.append(np.linalg.norm(_C.dequantize(codes, scales) - x))
        ratios = np.array(errors[:-1]) / errors[1:]
        assert (ratios[:2] > 1.7).all(), (rounding, errors)
        assert ratios[2] > 3, (rounding, errors)  # two bits at once


@pytest.mark.parametrize("bits", WIDE)
def test_gptq_equals_twin(bits):
    rng = np.random.default_rng(bits)
    factor = _C.gptq_factor(_C.gram(rng.standard_normal((256, 64)).astype(np.float32)))
    w = rng.standard_normal((9, 64)).astype(np.float32)
    for group, bfloat16 in ((0, False), (32, True)):
        codes, scales = _C.gptq_round(w, *factor, bits, group, True, bfloat16)
        twin, twin_scales = reference.gptq_round(w, *factor, bits, group, True, bfloat16)
        assert np.mean(codes != twin) < 0.02  # sums in float32: codes at a boundary may differ
        np.testing.assert_allclose(scales, twin_scales, rtol=0.01)
