"""Measures of outliers against hand-computed cases, and the replayed steps of a rotation."""

from dataclasses import replace

import numpy as np
import pytest
from blocks import SITES
from conftest import random_factor
from solver_steps import STEPS

import singlequant as sq
from singlequant import _C, _reference
from singlequant.config import DEFAULT_CLIP, QuantConfig
from singlequant.methods import singlequant
from singlequant.methods.registry import METHODS as ALL_METHODS, find_method
from singlequant.methods.solve import solve_site
from singlequant.rotations import SiteRotation
from singlequant.study import inspect as outliers
from singlequant.study.inspect import (
    inspect_model,
    measure,
    transform,
    transform_weights,
    transformation_steps,
)

F32 = np.float32
METHODS = [name for name, row in ALL_METHODS.items() if not row.residual]


@pytest.fixture(scope="module")
def statistics():
    """Sites of the bundled model's second layer."""
    checkpoint = sq.load_checkpoint(sq.bundled_model())
    windows = sq.calibration_windows(checkpoint, QuantConfig(calibration_tokens=512))
    return next(sq.calibrate(checkpoint, windows)).sites


# ---- measures -----------------------------------------------------------------------------------


def test_core_equals_reference():
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, (17, 129)).astype(F32)
    x[3] = 0
    codes, scales, _ = _C.quantize(x)
    found = _C.outliers(x, codes, scales[:, 0], 2.0)
    expected = _reference.outliers(x, codes, scales[:, 0], 2.0)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert found[2].sum() > 0


def test_core_does_not_depend_on_threads():
    x = np.random.default_rng(1).standard_normal((33, 700)).astype(F32)
    codes, scales, _ = _C.quantize(x)
    results = []
    for threads in (1, 2, 5):
        _C.set_num_threads(threads)
        results.append(_C.outliers(x, codes, scales[:, 0], 2.0))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("changes", "message"), [
    ({"codes": np.zeros((2, 4), np.int8)}, "codes: expected shape"),
    ({"scales": np.ones(3, F32)}, "scales: expected shape"),
    ({"normal": 0.0}, "normal: expected a finite number above 0"),
    ({"normal": np.inf}, "normal: expected a finite number above 0"),
    ({"x": np.array([[1, np.nan, 0], [0, 0, 0]], F32)}, "x, scales"),
    ({"x": np.zeros((2, 0), F32)}, "x: expected k >= 1"),
])
def test_core_rejects_bad_input(changes, message):
    arguments = {"x": np.ones((2, 3), F32), "codes": np.ones((2, 3), np.int8),
                 "scales": np.ones(2, F32), "normal": 6.0}
    with pytest.raises(ValueError, match=message):
        _C.outliers(**{**arguments, **changes})


def test_measures_of_equal_magnitudes():
    x = np.array([[2, -2, 2, -2], [1, 1, -1, -1]], F32)
    found = measure(x)
    assert found.massive == (0, 0)
    assert found.largest == pytest.approx(2 / 1.5)  # the median of four ones and four twos
    assert found.normal == 0
    assert found.peak == pytest.approx(1)
    assert found.kurtosis == pytest.approx(1)
    assert found.fill == pytest.approx(2)
    assert found.flatness == pytest.approx(0, abs=1e-7)
    assert found.activation_error == pytest.approx(0, abs=1e-12)  # +-max is a code
    assert found.utilization == pytest.approx(1 / 4)  # two codes, one bit of four


def test_measures_of_one_channel_in_four():
    x = np.array([[3, 0, 0, 0]] * 5, F32)
    found = measure(x, normal=1.5)
    assert found.peak == pytest.approx(4)  # rms 3 / 2
    assert found.kurtosis == pytest.approx(4)  # (81 / 4) / (9 / 4)^2
    assert found.fill == pytest.approx(0.5)  # (3 / 4) / (3 / 2)
    assert found.normal == 1
    assert found.flatness == pytest.approx(1)  # |(d, 0, 0, 0) - d / 2 (1, 1, 1, 1)| = d
    entropy = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    assert found.utilization == pytest.approx(entropy / 4)
    assert found.largest == 0  # the median is 0: there is no ratio
    assert found.massive == (5, 5)  # and every other entry lies beyond it


def test_activation_error_by_hand():
    x = np.array([[7, 3.4, -0.25, 0]], F32)  # scale 1: codes 7, 3, 0, 0
    expected = (0.4**2 + 0.25**2) / (49 + 3.4**2 + 0.25**2)
    assert measure(x).activation_error == pytest.approx(expected, rel=1e-6)
    clipped = np.array([[7, 3.5]], F32)  # clip 0.5: scale 0.5, codes 7 (3.5) and 7
    assert measure(clipped, clip=0.5).activation_error == pytest.approx(3.5**2 / (49 + 3.5**2))


def test_utilization_of_all_codes_is_nearly_whole():
    x = np.tile(np.linspace(-7.4, 7, 1500, dtype=F32), (3, 1))
    assert 0.95 < measure(x).utilization < 1  # 15 of 16 codes: log2(15) / 4 = 0.977
    assert measure(x, bits=8).utilization < 1


def test_gaussian_and_uniform_kurtosis():
    rng = np.random.default_rng(2)
    assert measure(rng.standard_normal((64, 4096))).kurtosis == pytest.approx(3, abs=0.05)
    assert measure(rng.uniform(-1, 1, (64, 4096))).kurtosis == pytest.approx(1.8, abs=0.02)
    assert measure(rng.uniform(-1, 1, (64, 4096))).fill == pytest.approx(1, abs=0.02)


def test_massive_outliers_are_counted_exactly():
    x = np.random.default_rng(3).choice([-1, 1], (100, 64)).astype(F32)
    x[5, 7], x[60, 7], x[2, 9] = 1500, -1500, 150
    found = measure(x, massive=(100, 149, 150, 1000, 1500))
    assert found.massive == (3, 3, 2, 2, 0)  # beyond, not at
    assert found.largest == 1500


def test_normal_outliers_need_their_share_of_the_tokens():
    x = np.random.default_rng(4).choice([-1, 1], (100, 1000)).astype(F32)
    x[:6, 10] = 50  # 6 tokens
    x[:5, 11] = 50  # 5 tokens
    assert measure(x).normal == 1
    assert measure(x, normal_share=0.05).normal == 2
    assert measure(x, normal=50).normal == 0


def test_tokens_of_zeros_are_left_out():
    x = np.array([[3, 0, 0, 0], [0, 0, 0, 0]], F32)
    assert measure(x).peak == pytest.approx(4)
    nothing = measure(np.zeros((2, 4), F32))
    assert nothing.peak == nothing.kurtosis == nothing.activation_error == nothing.largest == 0
    assert nothing.massive == (0, 0)


def test_measures_do_not_depend_on_scale():
    x = np.random.default_rng(5).standard_t(3, (40, 96)).astype(F32)
    a, b = measure(x), measure(x * F32(4))
    assert a == b


@pytest.mark.parametrize(("arguments", "message"), [
    ({"x": np.zeros(3)}, "x: expected"),
    ({"x": np.zeros((0, 3))}, "x: expected"),
    ({"x": np.full((2, 3), np.inf)}, "x"),
    ({"massive": ()}, "massive: expected at least one"),
    ({"massive": (-1.0,)}, "massive: expected a finite number above 0, found -1.0"),
    ({"normal": float("nan")}, "normal: expected"),
    ({"normal_share": 0.0}, "normal_share: expected"),
])
def test_measure_rejects_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure(**{"x": np.ones((2, 3)), **arguments})


def test_output_error_is_the_definition(statistics):
    found = inspect_model(sq.bundled_model(), ["none"], layer=0, site="o",
                          config=QuantConfig("w4a4", bits=4, calibration_tokens=512, weights="rtn"))
    x, w = statistics["o"].sample, statistics["o"].weights
    codes = [_C.quantize(x, 4, 0, True, DEFAULT_CLIP["w4a4"]), _C.quantize(w, 4)]
    quantized = [_C.dequantize(c, s).astype(np.float64) for c, s, _ in codes]
    exact = x.astype(np.float64) @ w.T
    expected = np.sum((quantized[0] @ quantized[1].T - exact) ** 2) / np.sum(exact**2)
    assert found.rows[0].output_error == pytest.approx(expected, rel=1e-4)
    assert len(found.rows) == 1
    assert found.rows[0].final


# ---- steps --------------------------------------------------------------------------------------


def test_each_sweep_and_art_is_told_apart(statistics):
    """The steps' numbers of rotations are those that the solver counted."""
    for method in ("singlequant", "balanced"):
        rotation = solve_site(statistics["down"], method)
        steps = transformation_steps(rotation)
        sizes = [0 if p is None else p.left.steps + p.right.steps for _, p in steps]
        grown = list(zip([name for name, _ in steps], np.diff(sizes, prepend=0), strict=True))
        for kind in ("sweep", "ART"):
            grew = sum(size for name, size in grown if name.startswith(kind))
            assert grew == rotation.givens_count(kind)


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_named_in_the_solvers_order(statistics, method):
    reads = "mlp" if "mlp" in find_method(method).aligns else "residual"
    whole = singlequant.build if method == "singlequant" else method  # which may choose less
    rotation = solve_site(replace(statistics["down"], reads=reads), whole)
    names = [name for name, _ in transformation_steps(None if method == "none" else rotation)]
    assert [name for name in names if name != "ART, axis 2"] == STEPS[method]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "none"])
@pytest.mark.parametrize("site", SITES)
def test_replayed_final_step_is_the_whole_rotation(statistics, method, site):
    rotation, x = solve_site(statistics[site], method), statistics[site].sample
    name, partial = transformation_steps(rotation)[-1]
    balance = np.float32(1) if rotation.balance is None else rotation.balance
    turn = rotation.of_inputs
    expected = x / balance if turn is None else _C.rotate(x / balance, turn)
    np.testing.assert_array_equal(transform(partial, x), expected)


def test_inspect_measures_blocks_and_balances(make_checkpoint, tmp_path):
    """DuQuant's blocks, solved and from a folder; SmoothQuant's balance, which turns nothing."""
    model = make_checkpoint(tmp_path / "m", layers=1)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 100)
    config = QuantConfig("w4a4", bits=4, method="duquant", calibration_tokens=64)
    rows = outliers.inspect_model(model, ["duquant", "smoothquant"], config=config).rows
    names = {(r.site, r.method): r.name for r in rows if r.final}
    assert {names[site, "duquant"] for site in SITES} == {"second blocks"}
    assert {s for s in SITES if names[s, "smoothquant"] == "balance"} == {"qkv", "gate_up"}


@pytest.mark.parametrize(("method", "folded"), [
    ("balanced", "a balance"), ("smoothquant", "a balance"), ("duquant", "a balance"),
    ("quarot", "a rotation of the residual stream")])
def test_packed_folder_that_hides_its_transformation_is_refused(model, text, tmp_path, method,
                                                                folded):
    config = QuantConfig("w4a4", bits=4, method=method, calibration_tokens=64, weights="rtn")
    sq.quantize_folder(model, tmp_path / "out", config, text)
    with pytest.raises(ValueError, match=f"its method, {method}, folds {folded} into the weights"):
        inspect_model(tmp_path / "out", original=model, calibration=text)


@pytest.mark.parametrize("method", ["paper", "singlequant"])
def test_steps_compose_to_the_whole_rotation(statistics, method):
    """The step before the last, and then the last operation by hand, is the last."""
    rotation = solve_site(statistics["qkv"], method)
    (_, before), (_, last) = transformation_steps(rotation)[-2:]
    x = statistics["qkv"].sample.astype(np.float64)
    chain = slice(before.right.steps, None)
    rows = transform(before, x.astype(F32)).astype(np.float64).reshape(-1, rotation.right.order)
    by_hand = _C.chain_apply(last.right.pairs[chain], last.right.angles[chain], rows)
    np.testing.assert_allclose(transform(last, x.astype(F32)).reshape(by_hand.shape), by_hand,
                               atol=1e-4)
    assert last.right.steps > before.right.steps


def test_every_step_keeps_the_product(statistics):
    rotation = solve_site(statistics["o"], "paper")
    x, w = statistics["o"].sample, statistics["o"].weights
    exact = x @ w.T
    for _, partial in transformation_steps(rotation):
        found = transform(partial, x) @ transform_weights(partial, w).T
        np.testing.assert_allclose(found, exact, atol=1e-4 * np.abs(exact).max())


def test_rotation_without_recorded_steps_is_one_step():
    rng = np.random.default_rng(6)
    rotation = SiteRotation(random_factor(rng, 6), random_factor(rng, 8, hadamard=False))
    assert transformation_steps(rotation) == [("original", None), ("final", rotation)]


def test_diagonal_balance_is_a_step_of_its_own():
    rng = np.random.default_rng(8)
    rotation = SiteRotation(random_factor(rng, 6), random_factor(rng, 8),
                            balance=rng.uniform(0.5, 2, 48).astype(F32))
    steps = transformation_steps(rotation)
    assert [name for name, _ in steps] == ["original", "balance", "final"]
    x, w = rng.standard_normal((2, 5, 48)).astype(F32)
    np.testing.assert_allclose(transform(steps[1][1], x), x / rotation.balance, rtol=1e-5)
    for _, partial in steps:
        product = transform(partial, x) @ transform_weights(partial, w).T
        np.testing.assert_allclose(product, x @ w.T, atol=1e-4)


@pytest.mark.parametrize("orders", [(12, 16), (600, 4)])
def test_stored_rotation_shows_the_whole(orders):
    rng = np.random.default_rng(7)
    rotation = SiteRotation(*(random_factor(rng, order) for order in orders))
    stored = rotation.core
    assert transformation_steps(stored) == [("original", None), ("final", stored)]
    x = rng.standard_normal((5, orders[0] * orders[1])).astype(F32)
    np.testing.assert_array_equal(transform(stored, x), _C.rotate(x, rotation.core))
