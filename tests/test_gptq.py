# SPDX-License-Identifier: Apache-2.0
"""GPTQ: the core equals its float64 twin, lowers the layer error, and runs through the sweep."""

import dataclasses
import gc
import hashlib
import itertools
import weakref
from dataclasses import replace

import numpy as np
import pytest
from blocks import SITES

import singlequant as sq
from singlequant import _C, _reference as reference
from singlequant.cli.main import main
from singlequant.config import GPTQ_INPUTS
from singlequant.methods.solve import solve_layer
from singlequant.sweep.calibrate import load_statistics, save_statistics
from singlequant.sweep.estimate import dry_run
from singlequant.sweep.layer import gptq_factor, quantize_layer, quantize_linear, transform_inputs


def correlated(rng, m, k):
    """Inputs [m, k] with unequal scales and correlations, as a layer's have."""
    mix = np.eye(k) + 0.5 * rng.standard_normal((k, k)) / np.sqrt(k)
    return (rng.standard_normal((m, k)) @ mix * rng.lognormal(0, 0.7, k)).astype(np.float32)


def problem(k, n=20, seed=0):
    """(weights [n, k], Gram matrix [k, k] in float64) of twice as many tokens as inputs."""
    rng = np.random.default_rng([seed, k])
    x = correlated(rng, 2 * k + 8, k).astype(np.float64)
    return rng.standard_t(4, (n, k)).astype(np.float32), x.T @ x


def objective(weights, codes, scales, gram):
    """tr(E H E^T), E = weights - dequantized codes."""
    error = weights.astype(np.float64) - _C.dequantize(codes, scales)
    return np.einsum("ij,jk,ik", error, gram, error, optimize=True)


# ---- core -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "k"), [(1, 1), (0, 5), (7, 33), (300, 257), (50, 600)])
def test_gram_equals_twin_and_adds(m, k):
    x = np.random.default_rng(k).standard_normal((m, k)).astype(np.float32)
    gram = _C.gram(x)
    tolerance = 1e-5 * max(m, 1)
    np.testing.assert_allclose(gram, reference.gram(x), atol=tolerance)
    np.testing.assert_array_equal(gram, gram.T)
    again = _C.gram(x, gram)
    assert again is gram
    np.testing.assert_allclose(gram, 2 * reference.gram(x), atol=2 * tolerance)


@pytest.mark.parametrize(("m", "k"), [(1, 1), (0, 5), (7, 33), (300, 257), (50, 600), (4200, 40)])
def test_gram_in_8_bits_equals_twin_and_adds(m, k):
    rng = np.random.default_rng(k)
    x = rng.standard_normal((m, k)).astype(np.float32)
    x[::5] *= 300  # massive tokens
    x[1::7] = 0
    x[:, :1] *= 50  # an outlier channel
    twin = reference.gram(x, bits=8)
    gram = _C.gram(x, bits=8)
    np.testing.assert_array_equal(gram, gram.T)
    size = np.sqrt(np.outer(np.diag(twin), np.diag(twin)))
    assert (np.abs(gram - twin) <= 2e-4 * size).all()  # a code may fall to either side of a half
    assert (np.abs(gram - reference.gram(x)) <= 0.02 * size).all()
    before = gram.copy()
    np.testing.assert_allclose(_C.gram(x, gram, 8), 2 * before, rtol=1e-5)


def test_gram_in_8_bits_sees_small_tokens_beside_massive_ones():
    x = np.random.default_rng(0).standard_normal((512, 64)).astype(np.float32)
    massive = x.copy()
    massive[::64] *= 1e3  # beyond it float32 sums of both would not keep the small ones
    small = np.delete(massive, np.s_[::64], axis=0)
    rest = _C.gram(massive, bits=8).astype(np.float64) - _C.gram(massive[::64], bits=8)
    np.testing.assert_allclose(rest, reference.gram(small), atol=10)


@pytest.mark.parametrize("bits", [8, 32])
def test_gram_turns_what_it_multiplies(bits):
    x = np.random.default_rng(1).standard_normal((2100, 48)).astype(np.float32)
    columns = np.linspace(0.5, 2, 48, dtype=np.float32)
    left, right = _C.random_orthogonal(6, 1), _C.random_orthogonal(8, 2)
    found = _C.gram(x, None, bits, _C.Rotation(48, left, right), columns)
    twin = reference.gram(x, None, bits, np.kron(left, right), columns)
    np.testing.assert_allclose(found, twin, atol=3e-3 * np.diag(twin).mean())


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("k", [40, 300])
def test_gram_gives_the_same_bytes_at_any_thread_count(bits, k):
    x = np.random.default_rng(2).standard_normal((700, k)).astype(np.float32)
    found = []
    for threads in (1, 2, 5):
        _C.set_num_threads(threads)
        found.append(_C.gram(x, bits=bits).tobytes())
    assert len(set(found)) == 1


def test_gram_refuses_what_does_not_fit():
    x = np.zeros((3, 8), np.float32)
    with pytest.raises(ValueError, match="bits: expected 8 or 32, got 16"):
        _C.gram(x, None, 16)
    with pytest.raises(ValueError, match="columns"):
        _C.gram(x, columns=np.ones(7, np.float32))
    with pytest.raises(ValueError, match="rotation"):
        _C.gram(x, rotation=_C.Rotation(4, _C.random_orthogonal(2, 1), _C.random_orthogonal(2, 2)))


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("k", [1, 2, 64, 129, 700])  # 700: three tiles, the last one short
def test_factor_equals_twin(k, order):
    gram = problem(k)[1].astype(np.float32)
    before = gram.copy()
    factor, permutation = _C.gptq_factor(gram, 0.01, order)
    np.testing.assert_array_equal(gram, before)
    expected, expected_permutation = reference.gptq_factor(gram, 0.01, order)
    np.testing.assert_array_equal(permutation, expected_permutation)
    np.testing.assert_allclose(factor, expected, atol=1e-5 * expected.max())
    np.testing.assert_array_equal(np.triu(factor, 1), 0)
    in_place = _C.gptq_factor(gram, 0.01, order, overwrite=True)
    assert in_place[0] is gram
    np.testing.assert_array_equal(gram, factor)


def test_order_is_by_falling_diagonal_and_stable():
    gram = np.diag(np.float32([2, 5, 2, 9, 5]))
    assert _C.gptq_factor(gram, 0.0, True)[1][::-1].tolist() == [3, 1, 4, 0, 2]
    assert _C.gptq_factor(gram)[1].tolist() == [4, 3, 2, 1, 0]


CASES = [  # k, group: whole rows, groups within a block of 128, that fill it, longer ones, odd ones
    (1, 0), (129, 0), (300, 0), (64, 32), (192, 64), (256, 128), (384, 192), (320, 160), (258, 43),
]


@pytest.mark.parametrize("search", [False, True], ids=["plain", "search"])
@pytest.mark.parametrize("order", [False, True], ids=["own", "act-order"])
@pytest.mark.parametrize(("k", "group"), CASES)
def test_round_equals_twin(k, group, order, search):
    weights, gram = problem(k)
    codes, scales = _C.gptq_round(weights, *_C.gptq_factor(gram, 0.01, order), 4, group, search)
    expected = reference.gptq_round(
        weights, *reference.gptq_factor(gram, 0.01, order), 4, group, search
    )
    assert codes.dtype == np.int8
    assert scales.shape == expected[1].shape
    assert np.mean(codes == expected[0]) > 0.999  # a value on a boundary changes its row's rest
    np.testing.assert_allclose(np.median(scales / expected[1]), 1, rtol=1e-5)
    found = objective(weights, codes, scales, gram)
    assert found == pytest.approx(objective(weights, *expected, gram), rel=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("order", [False, True])
def test_round_lowers_the_objective(bits, group, order):
    weights, gram = problem(256, n=64)
    factor = _C.gptq_factor(gram, 0.01, order)
    for search in (False, True):
        nearest = _C.quantize(weights, bits, group, True, 1.0, search)[:2]
        rounded = _C.gptq_round(weights, *factor, bits, group, search)
        assert objective(weights, *rounded, gram) < 0.9 * objective(weights, *nearest, gram)


def test_round_without_correlations_is_rounding_to_nearest():
    weights = problem(96)[0]
    factor = _C.gptq_factor(np.diag(np.arange(1, 97)).astype(np.float32))
    for group, search in itertools.product((0, 32), (False, True)):
        expected = _C.quantize(weights, 4, group, True, 1.0, search)
        for found, wanted in zip(_C.gptq_round(weights, *factor, 4, group, search), expected[:2],
                                 strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_that_are_always_zero_are_rounded_to_nearest(damping):
    weights, gram = problem(64)
    dead = [0, 17, 63]
    gram[dead] = gram[:, dead] = 0
    codes, scales = _C.gptq_round(weights, *_C.gptq_factor(gram, damping))
    np.testing.assert_array_equal(scales, _C.quantize(weights)[1])
    np.testing.assert_array_equal(codes[:, dead], _C.quantize(weights)[0][:, dead])
    alive = np.setdiff1d(np.arange(64), dead)
    assert (codes[:, alive] != _C.quantize(weights)[0][:, alive]).any()


def test_a_site_without_any_input_is_rounded_to_nearest():
    weights = problem(40)[0]
    factor = _C.gptq_factor(np.zeros((40, 40), np.float32))
    np.testing.assert_array_equal(_C.gptq_round(weights, *factor)[0], _C.quantize(weights)[0])


def test_rows_of_zeros_get_scale_and_codes_zero():
    weights, gram = problem(64)
    weights[[3, 16]] = 0
    codes, scales = _C.gptq_round(weights, *_C.gptq_factor(gram), 4, 32)
    assert not scales[[3, 16]].any()
    assert not codes[[3, 16]].any()
    assert scales[[2, 4]].all()


def test_fewer_tokens_than_inputs_and_massive_inputs_are_factored():
    rng = np.random.default_rng(3)
    x = correlated(rng, 40, 512)
    x[:, 7] *= 300
    weights = rng.standard_normal((24, 512)).astype(np.float32)
    gram = reference.gram(x)
    nearest = objective(weights, *_C.quantize(weights)[:2], gram)
    for order, share in ((False, 1.0), (True, 0.5)):
        found = _C.gptq_round(weights, *_C.gptq_factor(_C.gram(x), 0.01, order))
        expected = reference.gptq_round(weights, *reference.gptq_factor(gram, 0.01, order))
        assert objective(weights, *found, gram) < share * nearest
        assert objective(weights, *found, gram) < 1.02 * objective(weights, *expected, gram)


def least_pivot(h):
    """The smallest number that a Cholesky factorisation in h's own precision takes a root of."""
    h, least = h.copy(), np.inf
    for i in range(len(h)):
        least = min(least, h[i, i])
        if least <= 0:
            break
        column = h[i + 1 :, i] / np.sqrt(h[i, i])
        h[i + 1 :, i + 1 :] -= np.outer(column, column)
    return least


def test_a_matrix_beyond_float32_is_factored_in_float64():
    x = (150 + np.random.default_rng(0).integers(-3, 4, (100, 100))).astype(np.float32)
    gram = _C.gram(x)
    np.testing.assert_array_equal(gram, reference.gram(x))  # whole numbers: exact
    reverse = np.ascontiguousarray(gram[::-1, ::-1])
    assert least_pivot(reverse) <= 0 < least_pivot(reverse.astype(np.float64))
    factor = _C.gptq_factor(gram, 0.0)[0]
    expected = reference.gptq_factor(gram, 0.0)[0]
    np.testing.assert_allclose(np.diag(factor), np.diag(expected), rtol=1e-6)
    np.testing.assert_allclose(factor, expected, atol=1e-6 * expected.max())


@pytest.mark.parametrize(("group", "order"), [(0, False), (0, True), (64, False), (64, True)])
def test_results_do_not_depend_on_threads(group, order):
    rng = np.random.default_rng(5)
    x, weights = correlated(rng, 700, 640), rng.standard_normal((300, 640)).astype(np.float32)
    results = []
    for threads in (1, 2, 5):
        _C.set_num_threads(threads)
        gram = _C.gram(x)
        factor = _C.gptq_factor(gram, 0.01, order)
        results.append([gram, *factor, *_C.gptq_round(weights, *factor, 4, group, True)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_rows_do_not_depend_on_each_other():
    weights, gram = problem(96, n=300)
    factor = _C.gptq_factor(gram)
    whole = _C.gptq_round(weights, *factor, 4, 32, True)
    for rows in (slice(0, 128), slice(128, 256)):  # whole chunks of the core
        for a, b in zip(_C.gptq_round(weights[rows], *factor, 4, 32, True), whole, strict=True):
            np.testing.assert_array_equal(a, b[rows])


def test_error_texts():
    weights, gram = problem(64)
    factor, permutation = _C.gptq_factor(gram)
    for bad in (np.nan, np.inf):
        spoiled = gram.copy()
        spoiled[5, 9] = bad
        with pytest.raises(ValueError, match="^gram: NaN or Inf found"):
            _C.gptq_factor(spoiled)
        with pytest.raises(ValueError, match="^x: NaN or Inf found"):
            _C.gram(spoiled)
        spoiled = weights.copy()
        spoiled[19, 63] = bad
        with pytest.raises(ValueError, match="^weights, factor: NaN or Inf found"):
            _C.gptq_round(spoiled, factor, permutation)
    with pytest.raises(ValueError, match="^gram: expected a matrix that is positive definite"):
        _C.gptq_factor(-gram, 0.0)
    with pytest.raises(ValueError, match="^gram: expected a matrix that is positive definite"):
        _C.gptq_factor(np.ones((3, 3)), 0.0)
    with pytest.raises(ValueError, match=r"^gram: expected shape\[1\] = 64, got 63"):
        _C.gptq_factor(gram[:, :63])
    with pytest.raises(ValueError, match="^gram: expected 1 <= k <= 65536, got k = 0"):
        _C.gptq_factor(np.empty((0, 0)))
    for damping in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="^damping: expected a number from 0"):
            _C.gptq_factor(gram, damping)
    with pytest.raises(ValueError, match=r"^factor: expected shape\[0\] = 63, got 64"):
        _C.gptq_round(weights[:, :63], factor, permutation)
    with pytest.raises(ValueError, match="^group: expected 0 or a divisor of k = 64, got 48"):
        _C.gptq_round(weights, factor, permutation, 4, 48)
    with pytest.raises(ValueError, match="^bits: expected 4, 5, 6 or 8, got 3"):
        _C.gptq_round(weights, factor, permutation, 3)
    for other in (np.zeros(64, int), np.arange(1, 65), np.arange(-1, 63)):
        with pytest.raises(ValueError, match="indices that are no permutation"):
            _C.gptq_round(weights, factor, other)
    with pytest.raises(ValueError, match="a diagonal that is not positive"):
        _C.gptq_round(weights, np.zeros((64, 64)), permutation)


@pytest.mark.parametrize("out", [
    [[0.0] * 3] * 3, np.zeros((3, 3)), np.zeros((3, 6), np.float32)[:, ::2],
    np.broadcast_to(np.float32(0), (3, 3)),
])
def test_what_cannot_be_written_in_place_is_refused(out):
    with pytest.raises(TypeError, match="^out: expected a writable, contiguous float32"):
        _C.gram(np.ones((2, 3)), out)
    with pytest.raises(TypeError, match="^gram: expected a writable, contiguous float32"):
        _C.gptq_factor(out, overwrite=True)


def test_out_that_shares_memory_with_x_is_refused():
    memory = np.ones(24, np.float32)
    x, out = memory[:8].reshape(2, 4), memory[8:].reshape(4, 4)
    np.testing.assert_array_equal(_C.gram(x, out), np.full((4, 4), 3))  # apart, if barely
    for shared in (memory[7:23], memory[:16]):
        with pytest.raises(ValueError, match="^out: expected memory of its own"):
            _C.gram(x, shared.reshape(4, 4))
    with pytest.raises(ValueError, match="^out: expected memory of its own"):
        _C.gram(out, out)


def test_a_refused_update_leaves_out_as_it_was():
    out = np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match="x: NaN or Inf found"):
        _C.gram([[1, np.nan]], out)
    with pytest.raises(ValueError, match=r"out: expected shape\[0\] = 3, got 2"):
        _C.gram(np.ones((1, 3)), out)
    np.testing.assert_array_equal(out, 1)


# ---- config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [
    ("gptq_inputs", "both"), ("gptq_inputs", 1), ("gptq_order", 1), ("gptq_order", "yes"),
    ("gptq_damping", -0.1), ("gptq_damping", 2), ("gptq_damping", True), ("gptq_damping", "0.1"),
    ("gptq_damping", float("nan")),
])
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        sq.QuantConfig(**{field: value})


def test_config_goes_through_json():
    config = sq.QuantConfig(weights="gptq", gptq_inputs="quantized", gptq_order=True,
                            gptq_damping=0.05)
    assert sq.QuantConfig.from_json(config.to_json()) == config


# ---- stages -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    """The bundled model with the statistics, inputs included, of its layers."""
    checkpoint = sq.load_checkpoint(sq.bundled_model())
    windows = sq.calibration_windows(checkpoint, sq.QuantConfig(calibration_tokens=1024))
    return checkpoint, list(sq.calibrate(checkpoint, windows, keep_inputs=True))


def config(**changes) -> sq.QuantConfig:
    return sq.QuantConfig(**{"weights": "gptq", "bits": 4, "calibration_tokens": 64, **changes})


def output_errors(checkpoint, layer, config):
    """By linear: |X (W - dequantized W)^T|^2 on the rotated calibration inputs."""
    rotations, weights = solve_layer(layer, config.method), checkpoint.layer(layer.index)
    errors = {}
    for site, spec in checkpoint.spec.layer(0).sites.items():
        rotation, of_site = rotations.sites.get(site), layer.sites[site]
        x = transform_inputs(of_site.inputs, rotation)
        gptq = gptq_factor(of_site, rotation, config) if config.weights == "gptq" else None
        for role in spec.roles:
            linear = weights.linears[role]
            packed = quantize_linear(linear.weight, rotation, config, linear.name, gptq)
            codes = _C.unpack(packed.words, packed.shape[1])
            weight = transform_inputs(linear.weight.astype(np.float32), rotation)
            difference = weight - _C.dequantize(codes, packed.scales)
            errors[linear.name] = float(((x @ difference.T).astype(np.float64) ** 2).sum())
    return errors


@pytest.mark.parametrize("order", [False, True], ids=["own", "act-order"])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("method", ["none", "hadamard"])
def test_every_linear_of_the_bundled_model_errs_less_than_rounded_to_nearest(
    bundled, method, group, order
):
    checkpoint, layers = bundled
    common = {"method": method, "group_size": group, "gptq_order": order}
    for layer in layers:
        gptq = output_errors(checkpoint, layer, config(**common))
        for weights in ("rtn", "mse"):
            nearest = output_errors(checkpoint, layer, config(**common | {"weights": weights}))
            worse = {name: (gptq[name], nearest[name]) for name in gptq
                     if not gptq[name] < nearest[name]}
            assert not worse


def test_factor_is_of_the_inputs_as_they_are_run(bundled):
    site = bundled[1][0].sites["o"]
    recipe = config(method="none", scheme="w4a4", clip=0.7, calibration_bits=32)
    x = _C.dequantize(*_C.quantize(site.inputs, 4, 0, True, 0.7))
    run = gptq_factor(site, None, dataclasses.replace(recipe, gptq_inputs="quantized"))
    expected = reference.gptq_factor(reference.gram(x), recipe.gptq_damping, recipe.gptq_order)
    np.testing.assert_allclose(run.factor, expected[0], atol=1e-4 * expected[0].max())
    given = gptq_factor(site, None, dataclasses.replace(recipe, gptq_inputs="float"))
    assert abs(run.factor - given.factor).max() > 1e-2 * given.factor.max()
    wide = dataclasses.replace(recipe, gptq_inputs="quantized", scheme="w4a16")
    np.testing.assert_array_equal(gptq_factor(site, None, wide).factor, given.factor)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
def test_gptq_is_closer_to_the_original_than_mse(tmp_path, scheme):
    original, divergence = sq.load(sq.bundled_model()), {}
    tokens = original.encode(sq.bundled_text("heldout"))[:2048]
    for weights in ("gptq", "mse"):
        sq.quantize_folder(sq.bundled_model(), tmp_path / weights,
                           sq.QuantConfig(scheme, weights=weights, calibration_tokens=2048))
        model = sq.load(tmp_path / weights)
        divergence[weights] = sq.perplexity(model, tokens, 256, reference=original).kl_mean
    assert divergence["gptq"] < 0.9 * divergence["mse"]


def test_without_inputs_gptq_asks_for_a_calibration(model, tmp_path, text):
    checkpoint = sq.load_checkpoint(model)
    windows = sq.calibration_windows(checkpoint, config(), text)
    kept = list(sq.calibrate(checkpoint, windows, keep_inputs=True))
    assert all(len(site.inputs) == site.count for layer in kept for site in layer.sites.values())
    save_statistics(kept, tmp_path / "statistics")
    loaded = list(load_statistics(tmp_path / "statistics"))
    bare = next(sq.calibrate(checkpoint, windows, keep_inputs=False))
    for statistics in (loaded[0], bare):
        rotations = solve_layer(statistics, "hadamard")
        with pytest.raises(ValueError, match=r"^layer 0, inputs of qkv: statistics: weights 'gptq' "
                                             r"needs the calibration inputs.*keep_inputs=True"):
            quantize_layer(checkpoint, rotations, config())
    bare = replace(rotations, statistics=None)
    with pytest.raises(ValueError, match="^rotations: .* of layer 0, found none"):
        quantize_layer(checkpoint, bare, config())
    with pytest.raises(ValueError, match="^rotations: .* of layer 0, found layer 1's"):
        quantize_layer(checkpoint, replace(rotations, statistics=kept[1]), config())
    with pytest.raises(ValueError, match="^gptq: expected a factor with weights 'gptq'"):
        quantize_linear(np.ones((2, 32), np.float32), None, config())
    quantize_layer(checkpoint, bare, config(weights="mse"))


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def test_sweep_resumes_and_chains_to_the_same_bytes(model, tmp_path, text):
    recipe = config(gptq_order=True, gptq_inputs="quantized", group_size=32)

    def stop_after_one(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sq.quantize_folder(model, tmp_path / "out", recipe, text, progress=stop_after_one)
    assert sq.quantize_folder(model, tmp_path / "out", recipe, text,
                              resume=True).resumed_layers == 1
    for threads in (1, 5):
        sq.set_num_threads(threads)
        sq.quantize_folder(model, tmp_path / f"whole{threads}", recipe, text)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole1")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole5")
    checkpoint = sq.load_checkpoint(model)
    windows = sq.calibration_windows(checkpoint, recipe, text)
    statistics = sq.calibrate(checkpoint, windows, keep_inputs=True,
                              bits=recipe.calibration_bits)
    layers = sq.quantize(checkpoint, sq.solve_rotations(statistics, recipe), recipe)
    sq.save(layers, tmp_path / "chained", checkpoint, recipe)
    for name in ("model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        assert (tmp_path / "chained" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_ignored_linears_stay_and_their_sites_need_no_inputs(model, tmp_path, text):
    checkpoint = sq.load_checkpoint(model)
    recipe = config(method="hadamard", ignore=("*.mlp.*", "*.q_proj"))
    sq.quantize_folder(model, tmp_path / "out", recipe, text)
    found = sq.load_checkpoint(tmp_path / "out").layer(1).linears
    for role, linear in checkpoint.layer(1).linears.items():
        if role in ("k", "v", "o"):
            assert isinstance(found[role].weight, sq.PackedLinear)
        else:
            np.testing.assert_array_equal(found[role].weight, linear.weight)
    layer = next(sq.calibrate(checkpoint, sq.calibration_windows(checkpoint, config(), text)))
    everything = config(ignore=("*.mlp.*", "*.self_attn.*"))
    assert not quantize_layer(checkpoint, solve_layer(layer, "none"), everything).packed


def test_inputs_live_for_one_layer_only(model, text):
    checkpoint = sq.load_checkpoint(model)
    windows = sq.calibration_windows(checkpoint, config(), text)
    layers = sq.calibrate(checkpoint, windows, keep_inputs=True)
    first = next(layers)
    watched = [weakref.ref(first.sites[site].inputs) for site in SITES]
    del first
    next(layers)
    gc.collect()
    assert [ref() is None for ref in watched] == [True] * len(SITES)


def test_dry_run_and_command_line(model, tmp_path, text, capsys):
    assert dry_run(model, config(), text).bytes_after > 0
    options = ["--calibration", str(text), "--calibration-tokens", "64", "--weights", "gptq"]
    for i, more in enumerate(([], ["--gptq-order", "--gptq-inputs", GPTQ_INPUTS[1]],
                              ["--no-gptq-order", "--gptq-inputs", GPTQ_INPUTS[0]])):
        out = tmp_path / f"out{i}"
        assert main(["quantize", str(model), str(out), *options, *more]) == 0
        assert "weights gptq" in capsys.readouterr().out
        recipe = sq.QuantConfig.from_file(out / "recipe.json")
        if more:
            assert recipe.gptq_order == (more[0] == "--gptq-order")
            assert recipe.gptq_inputs == more[2]
        assert sq.load_checkpoint(out).quant_config.weights == "gptq"
