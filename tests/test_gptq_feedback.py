# SPDX-License-Identifier: Apache-2.0
"""GPTQ's error feedback in 8 bits: equals its twin, costs nothing, is the same on every table."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_gptq import objective, problem

from singlequant import _C, QuantConfig, _reference as reference
from singlequant.sweep.layer import gptq_factor, quantize_linear

# k, group: one block and several, the last one short, more than a run of four, groups in a block,
# groups that fill it and longer ones.
CASES = [(1, 0), (128, 0), (129, 0), (700, 0), (1088, 0), (640, 32), (640, 128), (1024, 256),
         (1280, 640)]


def prepared(k, order=False, n=40):
    weights, gram = problem(k, n)
    factor, permutation = _C.gptq_factor(gram.astype(np.float32), 0.01, order)
    return weights, gram, (factor, permutation)


@pytest.mark.parametrize("order", [False, True], ids=["own", "act-order"])
@pytest.mark.parametrize(("k", "group"), CASES)
def test_round_in_codes_equals_twin(k, group, order):
    weights, gram, factor = prepared(k, order, n=200)
    feedback = _C.gptq_feedback(factor[0])
    codes, scales = _C.gptq_round(weights, *factor, 4, group, True, feedback=feedback)
    expected = reference.gptq_round(weights, *factor, 4, group, True,
                                    feedback=reference.gptq_feedback(factor[0]))
    assert np.mean(codes == expected[0]) > 0.97  # a value on a boundary changes its row's rest
    np.testing.assert_allclose(np.median(scales / expected[1]), 1, rtol=1e-5)
    found = objective(weights, codes, scales, gram)
    assert found == pytest.approx(objective(weights, *expected, gram), rel=5e-3)


@pytest.mark.parametrize(("k", "group"), CASES)
def test_codes_cost_next_to_nothing(k, group):
    weights, gram, factor = prepared(k, n=200)
    exact = _C.gptq_round(weights, *factor, 4, group, True)
    rounded = _C.gptq_round(weights, *factor, 4, group, True,
                            feedback=_C.gptq_feedback(factor[0]))
    assert objective(weights, *rounded, gram) < 1.01 * objective(weights, *exact, gram)
    if k <= 128:
        np.testing.assert_array_equal(rounded[0], exact[0])  # one block: nothing in codes
    elif k > 256:
        assert (rounded[0] != exact[0]).any()


def test_groups_that_cut_blocks_stay_in_float32():
    weights, _, factor = prepared(288)
    exact = _C.gptq_round(weights, *factor, 4, 96)
    rounded = _C.gptq_round(weights, *factor, 4, 96, feedback=_C.gptq_feedback(factor[0]))
    np.testing.assert_array_equal(rounded[0], exact[0])


@pytest.mark.parametrize(("group", "order"), [(0, False), (0, True), (64, False), (256, False)])
def test_tables_and_threads_give_the_same_bytes(group, order):
    weights, _, factor = prepared(768, order, n=530)
    kernels, found = _C.kernels(), set()
    try:
        for name in kernels["runnable"]:
            for threads in (1, 3):
                _C.use_kernels(name)
                _C.set_num_threads(threads)
                feedback = _C.gptq_feedback(factor[0])
                codes, scales = _C.gptq_round(weights, *factor, 4, group, True, feedback=feedback)
                found.add(codes.tobytes() + scales.tobytes())
    finally:
        _C.use_kernels(kernels["active"])
    assert len(found) == 1


def test_a_table_keeps_its_panels_when_another_is_chosen():
    weights, _, factor = prepared(640)
    kernels, found = _C.kernels(), []
    try:
        for made in kernels["runnable"]:
            _C.use_kernels(made)
            feedback = _C.gptq_feedback(factor[0])
            _C.use_kernels("generic")
            found.append(_C.gptq_round(weights, *factor, feedback=feedback)[0].tobytes())
    finally:
        _C.use_kernels(kernels["active"])
    assert len(set(found)) == 1


def test_sums_that_overflow_end_in_codes():
    weights, _, (factor, permutation) = prepared(300)
    factor[-1, 0] = 3e38
    weights *= np.float32(1e30)
    codes, _ = _C.gptq_round(weights, factor, permutation, feedback=_C.gptq_feedback(factor))
    assert codes.min() >= -8
    assert codes.max() <= 7


def test_feedback_refuses_what_does_not_fit():
    weights, _, factor = prepared(64)
    with pytest.raises(ValueError, match="feedback: expected that of a factor with k = 64, got"):
        _C.gptq_round(weights, *factor, feedback=_C.gptq_feedback(np.eye(65, dtype=np.float32)))
    with pytest.raises(TypeError, match="feedback: expected None or what gptq_feedback returns"):
        _C.gptq_round(weights, *factor, feedback=7)
    with pytest.raises(ValueError, match="factor"):
        _C.gptq_feedback(np.zeros((3, 4), np.float32))
    for place in ((5, 5), (290, 3)):
        bad = np.eye(300, dtype=np.float32)
        bad[place] = np.nan
        with pytest.raises(ValueError, match="factor"):
            _C.gptq_feedback(bad)


@pytest.mark.parametrize("bits", [8, 32])
def test_calibration_bits_decide(bits):
    inputs = np.random.default_rng(0).standard_normal((900, 320)).astype(np.float32)
    made = gptq_factor(SimpleNamespace(inputs=inputs), None, QuantConfig(calibration_bits=bits))
    weights = problem(320)[0]
    given = [made.feedback] if bits == 8 else []
    assert (made.feedback is not None) == (bits == 8)
    expected = _C.gptq_round(weights, made.factor, made.permutation, 4, 0, True, False, *given)
    packed = quantize_linear(weights, None, QuantConfig(calibration_bits=bits), gptq=made)
    np.testing.assert_array_equal(packed.words, _C.pack(expected[0]))
