# SPDX-License-Identifier: Apache-2.0
"""Weights stored in floats of 8 and 4 bits: every code, every shape, against NumPy."""

import ml_dtypes
import numpy as np
import pytest

from singlequant import _C, _reference as reference

SEED = 5
BF16 = ml_dtypes.bfloat16
ALL = np.arange(256, dtype=np.uint8)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """The same bits, where NaN is NaN."""
    assert found.dtype == expected.dtype == np.uint16
    assert found.shape == expected.shape
    a, b = found.view(BF16), expected.view(BF16)
    np.testing.assert_array_equal(np.isnan(a.astype(np.float32)), np.isnan(b.astype(np.float32)))
    fine = ~np.isnan(b.astype(np.float32))
    np.testing.assert_array_equal(found[fine], expected[fine])


def test_fp8_of_every_code():
    found = _C.decode_fp8(ALL[None, None], np.ones((1, 1, 1)), 1, 256).view(BF16)[0, 0]
    values = found.astype(np.float64)
    assert values[:9].tolist() == [0, *(m / 512 for m in range(1, 8)), 1 / 64]  # subnormal, normal
    assert values[0x7E] == 448
    assert np.isnan(values[[0x7F, 0xFF]]).all()
    assert np.isnan(values).sum() == 2
    np.testing.assert_array_equal(values[128:255], -values[:127])
    assert np.signbit(values[128])


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 3.14159, 1e30, 1e38, np.inf, np.nan, 0.0, 1e-42])
def test_fp8_rounds_as_bfloat16_does(scale):
    codes = np.tile(ALL, 3)[None, None]
    scales = np.full((1, 1, 3), scale, np.float32)
    same(_C.decode_fp8(codes, scales, 1, 256), reference.decode_fp8(codes, scales, 1, 256))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 200, 300), (3, 128, 129), (2, 7, 128), (1, 0, 4),
                                   (0, 3, 4), (1, 3, 0), (1, 300, 4096)])
@pytest.mark.parametrize("block", [(128, 128), (1, 1), (1, 1000), (500, 500), (3, 50)])
def test_fp8_blocks_of_any_size(rng, shape, block, both_thread_counts):
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    grid = (shape[0], -(-shape[1] // block[0]), -(-shape[2] // block[1]))
    scales = rng.lognormal(0, 2, grid).astype(np.float32)
    one, two = both_thread_counts(lambda: _C.decode_fp8(codes, scales, *block))
    np.testing.assert_array_equal(one, two)
    same(one, reference.decode_fp8(codes, scales, *block))


@pytest.mark.parametrize(("codes", "scales", "block", "message"), [
    ((1, 4, 4), (1, 2, 1), (4, 4), r"scales: expected shape\[1\] = 1, got 2"),
    ((1, 5, 4), (1, 1, 1), (4, 4), r"scales: expected shape\[1\] = 2, got 1"),
    ((1, 4, 5), (1, 1, 1), (4, 4), r"scales: expected shape\[2\] = 2, got 1"),
    ((2, 4, 4), (1, 1, 1), (4, 4), r"scales: expected shape\[0\] = 2, got 1"),
    ((4, 4), (1, 1, 1), (4, 4), "codes: expected 3 dim"),
    ((1, 4, 4), (1, 1), (4, 4), "scales: expected 3 dim"),
    ((1, 4, 4), (1, 1, 1), (0, 4), "expected at least 1, got 0, 4"),
    ((1, 4, 4), (1, 1, 1), (4, -1), "expected at least 1, got 4, -1"),
])
def test_fp8_refuses_shapes_that_do_not_agree(codes, scales, block, message):
    with pytest.raises(ValueError, match=message):
        _C.decode_fp8(np.zeros(codes, np.uint8), np.ones(scales, np.float32), *block)


def test_mxfp4_of_every_code_and_scale():
    blocks = np.broadcast_to(ALL.reshape(1, 1, 16, 16), (1, 256, 16, 16)).copy()
    scales = np.broadcast_to(ALL.reshape(1, 256, 1), (1, 256, 16)).copy()
    found = _C.decode_mxfp4(blocks, scales)
    same(found, reference.decode_mxfp4(blocks, scales))
    one = found.view(BF16)[0, :, 127].astype(np.float64)  # scale 1
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert one[:16:2].tolist() == values  # bytes 0 to 7: low nibbles
    assert one[1::32].tolist() == [*values, *(-v for v in values)]
    assert np.isnan(found.view(BF16)[0, :, 255].astype(np.float32)).all()
    assert found.view(BF16)[0, 2, 0] == 2.0**-128


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 65, 3), (3, 64, 9), (1, 200, 4), (0, 2, 2),
                                   (2, 0, 2), (2, 2, 0)])
def test_mxfp4_of_any_size(rng, shape, both_thread_counts):
    blocks = rng.integers(0, 256, (*shape, 16)).astype(np.uint8)
    scales = rng.integers(100, 150, shape).astype(np.uint8)
    one, two = both_thread_counts(lambda: _C.decode_mxfp4(blocks, scales))
    np.testing.assert_array_equal(one, two)
    same(one, reference.decode_mxfp4(blocks, scales))


@pytest.mark.parametrize(("blocks", "scales", "message"), [
    ((1, 4, 2, 8), (1, 4, 2), r"blocks: expected shape\[3\] = 16, got 8"),
    ((1, 4, 2, 16), (1, 4, 3), r"scales: expected shape\[2\] = 2, got 3"),
    ((1, 4, 2, 16), (1, 5, 2), r"scales: expected shape\[1\] = 4, got 5"),
    ((1, 4, 2, 16), (2, 4, 2), r"scales: expected shape\[0\] = 1, got 2"),
    ((4, 2, 16), (4, 2), "blocks: expected 4 dim"),
])
def test_mxfp4_refuses_shapes_that_do_not_agree(blocks, scales, message):
    with pytest.raises(ValueError, match=message):
        _C.decode_mxfp4(np.zeros(blocks, np.uint8), np.zeros(scales, np.uint8))


def test_mxfp4_equals_transformers(rng):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = rng.integers(0, 256, (3, 20, 5, 16)).astype(np.uint8)
    scales = rng.integers(100, 150, (3, 20, 5)).astype(np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    same(_C.decode_mxfp4(blocks, scales), theirs.view(torch.int16).numpy().view(np.uint16))
