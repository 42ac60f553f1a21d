"""Words and PackedWeight: exact layout, round trips, what is refused and how it says so."""

import gc
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from singlequant import _C, _reference as reference

CODES = arrays(
    np.int8, array_shapes(min_dims=2, max_dims=2, max_side=70), elements=st.integers(-8, 7)
)


def test_pack_layout_is_low_nibble_first_offset_8():
    words = _C.pack(np.int8([[-8, -7, -6, -5, -4, -3, -2, -1], [0, 1, 2, 3, 4, 5, 6, 7]]))
    assert words.dtype == np.int32
    assert words.view(np.uint32).tolist() == [[0x76543210], [0xFEDCBA98]]


def test_pack_tail_is_code_zero():
    assert _C.pack(np.int8([[-8, 7, 1]])).view(np.uint32).tolist() == [[0x888889F0]]


@settings(max_examples=80, deadline=None)
@given(codes=CODES)
def test_pack_unpack_round_trip(codes):
    words = _C.pack(codes)
    np.testing.assert_array_equal(words, reference.pack(codes))
    np.testing.assert_array_equal(_C.unpack(words, codes.shape[1]), codes)
    np.testing.assert_array_equal(reference.unpack(words, codes.shape[1]), codes)


BAD_CODES = [
    (dtype, bad)
    for dtype in (np.int8, np.int16, np.int64, np.uint8, np.uint64)
    for bad in (8, -9, 127, -128, 255, 264, 2**32 + 3, 2**64 - 1)
    if np.iinfo(dtype).min <= bad <= np.iinfo(dtype).max
]


@pytest.mark.parametrize(("dtype", "bad"), BAD_CODES)
def test_pack_rejects_codes_out_of_range(dtype, bad):
    codes = np.zeros((3, 11), dtype)
    codes[2, 10] = bad
    with pytest.raises(ValueError, match=r"codes: expected values in -8 \.\. 7"):
        _C.pack(codes)


def test_pack_takes_any_integer_type_and_strides():
    codes = np.random.default_rng(0).integers(-8, 8, (6, 20))
    for same in (codes, codes.tolist(), codes.astype(">i2"), codes.astype(np.int8)):
        np.testing.assert_array_equal(_C.pack(same), reference.pack(codes))
    np.testing.assert_array_equal(_C.pack(codes[::2, ::-1]), reference.pack(codes[::2, ::-1]))
    assert _C.pack(codes[:0]).shape == (0, 3)


def test_pack_error_texts():
    with pytest.raises(TypeError, match="codes: expected an array"):
        _C.pack(np.ones((2, 2)))
    with pytest.raises(ValueError, match="codes: expected 2 dimensions, got 1"):
        _C.pack(np.zeros(8, np.int8))
    with pytest.raises(ValueError, match="codes: expected k >= 1, got 0"):
        _C.pack(np.zeros((2, 0), np.int8))
    words = np.zeros((2, 3), np.int32)
    text = r"words: expected \(n, ceil\(k \* 4 / 32\)\) = \(2, 4\), got \(2, 3\)"
    with pytest.raises(ValueError, match=text):
        _C.unpack(words, 25)
    with pytest.raises(ValueError, match="k: expected k >= 1, got 0"):
        _C.unpack(words, 0)
    with pytest.raises(TypeError, match="words: expected an array"):
        _C.unpack(words.astype(np.int64), 24)


def make(n=5, k=64, group=0):
    groups = k // group if group else 1
    return _C.PackedWeight(
        np.zeros((n, -(-k // 8)), np.int32), np.ones((n, groups), np.float32), k, group
    )


def test_packed_weight_says_what_it_is():
    weight = make(5, 64, 32)
    table = _C.kernels()["active"]
    assert weight.shape == (5, 64)
    assert weight.group == 32
    assert weight.kernels == table
    assert weight.nbytes >= 5 * 64 // 2 + 5 * 2 * 4
    assert weight.bits == 4
    assert repr(weight) == f"PackedWeight(shape=(5, 64), bits=4, group=32, kernels='{table}')"


def test_packed_weight_is_immutable():
    weight = make()
    for name in ("shape", "group", "kernels", "nbytes", "new"):
        with pytest.raises(AttributeError):
            setattr(weight, name, 1)
    with pytest.raises(TypeError):
        _C.PackedWeight.shape = None
    with pytest.raises(TypeError):
        type("Sub", (_C.PackedWeight,), {})


def test_packed_weight_copies_its_arguments():
    codes = np.random.default_rng(1).integers(-8, 8, (4, 32)).astype(np.int8)
    words, scales = _C.pack(codes), np.ones(4, np.float32)
    weight = _C.PackedWeight(words, scales, 32)
    x = np.eye(32, dtype=np.float32)
    before = _C.linear(x, weight, 16)
    words[:], scales[:] = 0, 9
    np.testing.assert_array_equal(_C.linear(x, weight, 16), before)
    np.testing.assert_array_equal(before, codes.T)


def test_packed_weight_ignores_tail_nibbles_of_the_words():
    codes = np.random.default_rng(2).integers(-8, 8, (3, 13)).astype(np.int8)
    words = _C.pack(codes)
    dirty = words.view(np.uint32) ^ np.uint32([0, 0xFFF00000])
    x = np.random.default_rng(3).standard_normal((2, 13)).astype(np.float32)
    for bits in (4, 8, 16):
        a = _C.linear(x, _C.PackedWeight(words, np.ones(3), 13), bits)
        b = _C.linear(x, _C.PackedWeight(dirty.view(np.int32), np.ones(3), 13), bits)
        np.testing.assert_array_equal(a, b)


def test_packed_weight_error_texts():
    words, scales = np.zeros((5, 12), np.int32), np.ones((5, 3), np.float32)
    words_text = r"words: expected \(n, ceil\(k \* 4 / 32\)\) = "
    group_text = "group: expected 0 or a multiple of 32 that divides k = 96, got "
    scales_text = r"scales: expected \(n, groups\) = "
    finite_text = "scales: expected finite values, got "
    infinite, nan = scales.copy(), scales.copy()
    infinite[2, 1], nan[4, 2] = np.inf, np.nan
    cases = [
        ((words, scales, 97, 32), words_text + r"\(5, 13\), got \(5, 12\)"),
        ((words, scales, 96, 31), group_text + "31"),
        ((words, scales, 96, 64), group_text + "64"),
        ((words, scales, 96, -32), group_text + "-32"),
        ((words, scales, 96), scales_text + r"\(5, 1\), got \(5, 3\)"),
        ((words, scales[:4], 96, 32), scales_text + r"\(5, 3\), got \(4, 3\)"),
        ((words, scales[:, 0], 96, 32), scales_text + r"\(5, 3\), got \(5,\)"),
        ((words, infinite, 96, 32), finite_text + "Inf in row 2"),
        ((words, nan, 96, 32), finite_text + "NaN in row 4"),
        ((words[:0], scales[:0], 96, 32), "words: expected n >= 1, got 0"),
        ((np.zeros((1, 2**18), np.int32), [1.0], 2**21),
         "k: expected k <= 1048576 with 4 bits, got 2097152"),
    ]
    for arguments, text in cases:
        with pytest.raises(ValueError, match=text):
            _C.PackedWeight(*arguments)


def test_packed_weight_frees_its_memory_and_type_reference():
    kind = _C.PackedWeight
    gc.collect()
    before = sys.getrefcount(kind)
    weights = [make(40, 4096) for _ in range(20)]
    assert sys.getrefcount(kind) == before + 20
    del weights
    assert sys.getrefcount(kind) == before
    for _ in range(20):  # failing constructions too
        with pytest.raises(ValueError, match="group"):
            make(4, 64, 48)
    assert sys.getrefcount(kind) == before
