"""Activations that are prepared once give what `linear` gives, bit for bit."""

import numpy as np
import pytest

import singlequant as sq
from singlequant import _C

SEED, K = 5, 96


def weight(rng, n, int8_inputs=0, bits=4):
    words, scales = _C.quantize_weight(rng.standard_normal((n, K)).astype(np.float32), 0, bits=bits)
    return _C.PackedWeight(words, scales, K, 0, int8_inputs, bits)


def turned():
    k1, k2 = _C.factor_sizes(K)
    none = np.empty((0, 2), np.int32), np.empty(0)
    return sq.SiteRotation(sq.Factor(k1, True, *none), sq.Factor(k2, True, *none)).core


@pytest.mark.parametrize(("bits", "int8_inputs"), [(4, 0), (4, 32), (8, 0), (16, 0)])
@pytest.mark.parametrize("shape", [(K,), (1, K), (7, K), (2, 3, K), (0, K)])
def test_each_linear_of_one_input_gives_what_it_gives_alone(table, rng, shape, bits, int8_inputs):
    x, rotation = rng.standard_normal(shape).astype(np.float32), turned()
    bias = rng.standard_normal(40).astype(np.float32)
    activations = _C.Activations(x, bits, 0.9, rotation, int8_inputs)
    assert (activations.shape, activations.bits) == (shape, bits)
    before = x.copy()
    x[...] = 7  # it has its own copy
    for n, added, weight_bits in ((40, bias, 4), (5, None, 8), (33, None, 6)):
        w = weight(rng, n, int8_inputs, weight_bits)
        np.testing.assert_array_equal(activations.linear(w, added),
                                      _C.linear(before, w, bits, 0.9, rotation, added))


def test_codes_do_not_depend_on_the_kernel_table(rng):  # rotations do, by their last bits
    x, active = rng.standard_normal((9, K)).astype(np.float32), _C.kernels()["active"]
    w, results = weight(rng, 40), set()
    for name in _C.kernels()["runnable"]:
        try:
            _C.use_kernels(name)
            results.add(_C.Activations(x, 8).linear(w).tobytes())
        finally:
            _C.use_kernels(active)
    assert len(results) == 1


@pytest.mark.parametrize(("arguments", "message"), [
    ((np.float32(1),), "x: expected 1 to"),
    ((np.zeros((2, 0)),), "x: expected 1 to"),
    ((np.full(K, np.nan),), "x.*NaN"),
    ((np.zeros(K), 5), "bits: expected 4, 8 or 16, got 5"),
    ((np.zeros(K), 4, 0.0), "clip: expected 0 < clip <= 1"),
    ((np.zeros(32), 4, 1.0, turned()), "rotation"),
    ((np.zeros(K), 4, 1.0, None, 31), "int8_inputs: expected a multiple of 32 below k = 96"),
    ((np.zeros(K), 4, 1.0, None, 96), "int8_inputs: expected a multiple of 32 below k = 96"),
    ((np.zeros(K), 8, 1.0, None, 32), "0 unless bits is 4, got 32"),
])  # fmt: skip
def test_arguments_that_do_not_go_together_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.Activations(*arguments)


def test_weights_of_other_inputs_are_named(rng):
    activations = _C.Activations(np.ones((2, K), np.float32), 4)
    with pytest.raises(ValueError, match="weight: expected 96 inputs and 0 of them at 8 bits, got "
                                         "96 and 32"):
        activations.linear(weight(rng, 8, 32))
    words, scales = _C.quantize_weight(np.ones((4, 64), np.float32), 0)
    with pytest.raises(ValueError, match="weight: expected 96 inputs .* got 64 and 0"):
        activations.linear(_C.PackedWeight(words, scales, 64))
    with pytest.raises(TypeError, match="weight: expected a PackedWeight"):
        activations.linear(words)
    with pytest.raises(ValueError, match=r"bias: expected shape\[0\] = 8, got 7"):
        activations.linear(weight(rng, 8), np.ones(7, np.float32))
