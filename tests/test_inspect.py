"""Outliers: each measure against hand-computed cases, the replayed steps, files and the command."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from blocks import SITES
from conftest import random_factor

import singlequant as sq
from singlequant import _C, _reference, files
from singlequant.cli.main import main
from singlequant.config import QuantConfig
from singlequant.methods.registry import METHODS as ALL_METHODS
from singlequant.methods.solve import solve_site
from singlequant.rotations import SiteRotation
from singlequant.rows import rotate_rows
from singlequant.study import inspect as outliers
from singlequant.study.inspect import (
    Inspection,
    inspect_model,
    measure,
    transform,
    transform_weights,
    transformation_steps,
)
from singlequant.study.inspect.run import _cells as cells_of

F32 = np.float32
METHODS = [name for name, row in ALL_METHODS.items() if not row.residual]


@pytest.fixture(scope="module")
def inspection():
    """The bundled model under three methods, on few tokens."""
    config = QuantConfig(calibration_tokens=512)
    return inspect_model(sq.bundled_model(), ["singlequant", "paper", "hadamard"], config=config,
                         surface=True)


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


# ---- steps --------------------------------------------------------------------------------------

# "ART, axis 2" is left out: whether a token is left to act on depends on the data.
STEPS = {
    "none": ["original"],
    "hadamard": ["original", "Hadamard, both axes"],
    "art": ["original", "ART, axis 1", "Hadamard, axis 2"],
    "urt": ["original", "URT, axis 1", "Hadamard, axis 2", "URT, axis 2"],
    "paper": ["original", "ART, axis 1", "URT, axis 1", "Hadamard, axis 2", "URT, axis 2"],
    "singlequant": ["original", "Hadamard, both axes", "ART, axis 1", "sweep 1, axis 1",
                    "sweep 1, axis 2", "sweep 2, axis 1", "sweep 2, axis 2"],
    "balanced": ["original", "balance", "principal directions, axis 1", "Hadamard, axis 2",
                 "sweep 1, axis 1", "sweep 1, axis 2", "sweep 2, axis 1", "sweep 2, axis 2"],
    "random": ["original", "random rotation, axis 1", "random rotation, axis 2"],
    "duquant": ["original", "balance", "first blocks", "permutation", "second blocks"],
    "smoothquant": ["original", "balance"],
}


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
    rotation = solve_site(replace(statistics["down"], reads="residual"), method)
    names = [name for name, _ in transformation_steps(None if method == "none" else rotation)]
    assert [name for name in names if name != "ART, axis 2"] == STEPS[method]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "none"])
@pytest.mark.parametrize("site", SITES)
def test_replayed_final_step_is_the_whole_rotation(statistics, method, site):
    rotation, x = solve_site(statistics[site], method), statistics[site].sample
    name, partial = transformation_steps(rotation)[-1]
    balance = np.float32(1) if rotation.balance is None else rotation.balance
    np.testing.assert_array_equal(transform(partial, x), rotate_rows(x / balance, rotation))


def test_inspect_measures_blocks_and_balances(make_checkpoint, tmp_path):
    """DuQuant's blocks, solved and from a folder; SmoothQuant's balance, which turns nothing."""
    model = make_checkpoint(tmp_path / "m", layers=1)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 100)
    config = QuantConfig(method="duquant", calibration_tokens=64)
    rows = outliers.inspect_model(model, ["duquant", "smoothquant"], config=config).rows
    names = {(r.site, r.method): r.name for r in rows if r.final}
    assert {names[site, "duquant"] for site in SITES} == {"second blocks"}
    assert {s for s in SITES if names[s, "smoothquant"] == "balance"} == {"qkv", "gate_up"}


@pytest.mark.parametrize(("method", "folded"), [
    ("balanced", "a balance"), ("smoothquant", "a balance"), ("duquant", "a balance"),
    ("quarot", "a rotation of the residual stream")])
def test_packed_folder_that_hides_its_transformation_is_refused(model, text, tmp_path, method,
                                                                folded):
    config = QuantConfig(method=method, calibration_tokens=64, weights="rtn")
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


# ---- a model ------------------------------------------------------------------------------------


def test_hadamard_lowers_peak_and_kurtosis(inspection):
    """At the sites with outlier channels; the mixed inputs of o_proj have none to begin with."""
    before = inspection.select(method="hadamard", step=0)
    after = inspection.select(method="hadamard", final=True)
    assert len(before) == len(after) == 5 * 4
    for a, b in zip(before, after, strict=True):
        assert (a.layer, a.site) == (b.layer, b.site)
        if a.site != "o":
            assert b.peak < a.peak / 3
            assert b.kurtosis < a.kurtosis / 3
            assert b.utilization > 1.5 * a.utilization
            assert b.activation_error < a.activation_error / 2
            assert b.output_error < a.output_error


def test_rows_are_whole_and_in_order(inspection):
    for name in inspection.methods:
        rows = inspection.select(method=name, layer=3, site="down")
        assert [row.step for row in rows] == list(range(len(rows)))
        assert [row.final for row in rows] == [False] * (len(rows) - 1) + [True]
        names = [row.name for row in rows if row.name != "ART, axis 2"]
        assert names == STEPS[name]
    assert {row.tokens for row in inspection.rows} == {512}
    assert {row.channels for row in inspection.select(site="down")} == {448}


def test_original_is_the_same_under_every_method(inspection):
    figures = [[vars(r) | {"method": ""} for r in inspection.select(method=m, step=0)]
               for m in inspection.methods]
    assert figures[0] == figures[1] == figures[2]


def test_output_error_is_the_definition(statistics):
    found = inspect_model(sq.bundled_model(), ["none"], layer=0, site="o",
                          config=QuantConfig(calibration_tokens=512, weights="rtn"))
    x, w = statistics["o"].sample, statistics["o"].weights
    codes = [_C.quantize(x, 4, 0, True, 0.8), _C.quantize(w, 4)]
    quantized = [_C.dequantize(c, s).astype(np.float64) for c, s, _ in codes]
    exact = x.astype(np.float64) @ w.T
    expected = np.sum((quantized[0] @ quantized[1].T - exact) ** 2) / np.sum(exact**2)
    assert found.rows[0].output_error == pytest.approx(expected, rel=1e-4)
    assert len(found.rows) == 1
    assert found.rows[0].final


def test_inspection_is_deterministic(inspection, model, text):
    config = QuantConfig(calibration_tokens=64)
    results = []
    for threads in (1, 3):
        _C.set_num_threads(threads)
        results.append(inspect_model(model, ["paper", "singlequant"], calibration=text,
                                     config=config))
    assert results[0].to_csv() == results[1].to_csv()
    assert results[0] == results[1]


def test_inspection_of_one_layer_is_part_of_the_whole(inspection):
    part = inspect_model(sq.bundled_model(), ["hadamard"], layer=2, site="gate_up",
                         config=QuantConfig(calibration_tokens=512))
    assert list(part.rows) == inspection.select(method="hadamard", layer=2, site="gate_up")


def test_surface_is_of_the_worst_site(inspection):
    surface = inspection.surface
    worst = max(inspection.select(step=0), key=lambda row: row.peak)
    assert (surface.layer, surface.site) == (worst.layer, worst.site)
    names = [name for name, _ in surface.panels]
    assert names == ["original", *inspection.methods]
    assert all(cells.shape == (64, 128) for _, cells in surface.panels)
    peaks = [cells.max() for _, cells in surface.panels]
    assert peaks[0] > 2 * max(peaks[1:])


def test_cells_keep_the_largest():
    x = np.zeros((513, 300), F32)
    x[512, 299], x[0, 0] = -9, 4
    cells = cells_of(x)
    assert cells.shape == (64, 128)
    assert cells[-1, -1] == 9
    assert cells[0, 0] == 4
    assert np.count_nonzero(cells) == 2
    assert cells_of(np.ones((1, 2), F32)).shape == (1, 2)


# ---- packed folders -----------------------------------------------------------------------------


@pytest.fixture
def packed(model, text, tmp_path):
    """(the original, its packed folder)."""
    config = QuantConfig(method="singlequant", calibration_tokens=64, weights="rtn")
    sq.quantize_folder(model, tmp_path / "out", config, text)
    return model, tmp_path / "out"


def test_packed_folder_shows_what_is_stored(packed, text):
    model, out = packed
    stored = inspect_model(out, original=model, calibration=text)
    solved = inspect_model(model, ["singlequant"], calibration=text,
                           config=QuantConfig(calibration_tokens=64, weights="rtn"))
    assert stored.methods == ("singlequant",)
    assert stored.calibration_tokens == 64
    assert [row.name for row in stored.rows[:3]] == ["original", "final", "original"]
    for a, b in zip(stored.select(final=True), solved.select(final=True), strict=True):
        assert (a.layer, a.site) == (b.layer, b.site)
        for name in outliers.FIGURE_FIELDS:
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-3, abs=1e-6), name
    assert stored.select(step=0)[0].peak == solved.select(step=0)[0].peak


def test_stored_codes_are_what_is_measured(packed, text):
    """Scales written ten times too large must show in the output error, and there alone."""
    from safetensors.numpy import load_file, save_file

    model, out = packed
    before = inspect_model(out, original=model, calibration=text, layer=0, site="down")
    path = next(out.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight_scale"] *= F32(10)
    save_file(tensors, path, {"format": "pt"})
    after = inspect_model(out, original=model, calibration=text, layer=0, site="down")
    assert after.rows[-1].output_error > 10 > before.rows[-1].output_error
    assert after.rows[-1].activation_error == before.rows[-1].activation_error
    assert after.rows[:-1] == before.rows[:-1]


def test_packed_folder_without_rotations_shows_the_original(model, text, tmp_path):
    config = QuantConfig(calibration_tokens=64, method="none")
    sq.quantize_folder(model, tmp_path / "out", config, text)
    found = inspect_model(tmp_path / "out", original=model, calibration=text)
    assert {(row.name, row.final) for row in found.rows} == {("original", True)}


@pytest.mark.parametrize(("change", "message"), [
    (lambda model, out: {"model": out}, "original: expected the model"),
    (lambda model, out: {"model": model, "original": model}, "original: expected with a packed"),
    (lambda model, out: {"model": out, "original": out}, "original: expected an unquantized"),
    (lambda model, out: {"model": out, "original": sq.bundled_model()},
     "original: expected the model that .* found another"),
    (lambda model, out: {"model": out, "original": model, "methods": ["paper"]},
     "methods: expected none with a packed folder"),
    (lambda model, out: {"model": model, "methods": ["spin"]}, "methods: .* found 'spin'"),
    (lambda model, out: {"model": model, "layer": 2}, "layer: expected 0 to 1, found 2"),
    (lambda model, out: {"model": model, "layer": -1}, "layer: expected 0 to 1, found -1"),
    (lambda model, out: {"model": model, "site": "v"}, "site: expected one of qkv.* found 'v'"),
    (lambda model, out: {"model": model, "config": QuantConfig(scheme="w4a16")},
     "scheme: expected w4a4 or w4a8"),
    (lambda model, out: {"model": model, "config": QuantConfig(group_size=128)}, "group_size"),
    (lambda model, out: {"model": model, "massive": [0.0]}, "massive"),
])
def test_inspect_model_rejects_bad_input(packed, text, change, message):
    with pytest.raises(ValueError, match=message):
        inspect_model(**{"calibration": text, **change(*packed)})


# ---- files and pictures -------------------------------------------------------------------------


def test_json_round_trip(inspection):
    text = json.dumps(inspection.to_json(), allow_nan=False)
    assert Inspection.from_json(json.loads(text)) == inspection
    with pytest.raises(ValueError, match="inspection: expected"):
        Inspection.from_json({"rows": []})


def test_csv_round_trip(inspection):
    rows = list(csv.DictReader(io.StringIO(inspection.to_csv())))
    assert len(rows) == len(inspection.rows)
    for text, row in zip(rows, inspection.rows, strict=True):
        assert (int(text["layer"]), text["site"], text["method"], text["name"]) == (
            row.layer, row.site, row.method, row.name)
        assert [int(text["massive_100"]), int(text["massive_1000"])] == list(row.massive)
        for name in outliers.FIGURE_FIELDS:
            assert float(text[name]) == getattr(row, name)


def test_repr_is_short(inspection):
    assert repr(inspection) == ("Inspection('stdlib-llama', singlequant, paper, hadamard, "
                                f"20 sites, {len(inspection.rows)} rows, 4 bits)")


def test_plots_show_the_rows(inspection):
    pytest.importorskip("matplotlib")
    heat = outliers.plot_heatmaps(inspection)
    panels = [axis for axis in heat.axes if axis.get_images()]
    assert [axis.get_title() for axis in panels] == ["original", *inspection.methods]
    image = np.asarray(panels[1].get_images()[0].get_array())
    assert image.shape == (5, 4)
    assert image[2, 3] == inspection.select(
        layer=2, site="down", method="singlequant", final=True)[0].peak
    assert len({axis.get_images()[0].norm.vmax for axis in panels}) == 1
    bars = outliers.plot_errors(inspection, "activation_error").axes[0]
    heights = [bar.get_height() for bar in bars.patches]
    assert len(heights) == 4 * 4
    mean = np.mean([row.activation_error for row in inspection.select(
        site="qkv", step=0, method="paper")])
    assert heights[0] == pytest.approx(mean)
    surface = outliers.plot_surface(inspection)
    assert len({axis.get_zlim() for axis in surface.axes}) == 1
    with pytest.raises(ValueError, match="field: expected one of"):
        outliers.plot_heatmaps(inspection, "rms")


def test_surface_asks_for_what_is_missing(model, text):
    found = inspect_model(model, ["none"], calibration=text, layer=0,
                          config=QuantConfig(calibration_tokens=64))
    with pytest.raises(ValueError, match="surface=True"):
        outliers.plot_surface(found)


def test_pictures_of_a_single_token_are_drawn(model, text, tmp_path):
    pytest.importorskip("matplotlib")
    found = inspect_model(model, ["none"], calibration=text, surface=True, layer=0, site="o",
                          config=QuantConfig(calibration_tokens=1))
    files.save_figure(outliers.plot_surface(found), tmp_path / "a.png")
    files.save_figure(outliers.plot_overview(found), tmp_path / "b.svg")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file() and p != text) == [
        "a.png", "b.svg"]


def test_files_appear_only_when_whole(tmp_path):
    class Broken:
        def savefig(self, file, dpi, format):
            file.write(b"half")
            raise OSError("disk full")

    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        files.save_figure(Broken(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    assert path.read_bytes() == b"old"


# ---- the command --------------------------------------------------------------------------------


def test_command_prints_both_tables(model, text, capsys):
    assert main(["inspect", str(model), "--calibration", str(text), "--calibration-tokens", "64",
                 "--method", "paper", "hadamard"]) == 0
    printed = capsys.readouterr().out
    for name in ("original", "paper", "hadamard", "URT, axis 2", "Hadamard, both axes", "MO>1000",
                 "4-bit activations, clip 0.8"):
        assert name in printed
    assert sum(line.startswith("    1 down") for line in printed.splitlines()) == 3


def test_command_writes_files_and_json(model, text, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("p.png", "s.png", "t.csv")]
    assert main(["inspect", str(model), "--calibration", str(text), "--calibration-tokens", "64",
                 "--scheme", "w4a8", "--layer", "1", "--site", "down", "--massive", "5",
                 "--normal", "2", "--picture", str(files[0]), "--surface", str(files[1]),
                 "--csv", str(files[2]), "--json"]) == 0
    found = Inspection.from_json(json.loads(capsys.readouterr().out))
    assert found.bits == 8
    assert found.clip == 1.0
    assert found.massive == (5.0,)
    assert found.normal == 2.0
    assert {(row.layer, row.site) for row in found.rows} == {(1, "down")}
    assert files[2].read_text() == found.to_csv()
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[:2])


def test_command_reads_a_packed_folder(packed, text, capsys):
    model, out = packed
    assert main(["inspect", str(out), "--original", str(model), "--calibration", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "weights rtn" in printed
    assert "final" in printed
    assert main(["inspect", str(out)]) == 2
    assert "original: expected the model" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    (["--layer", "9"], "layer: expected 0 to 1, found 9"),
    (["--massive", "-3"], "massive: expected"),
    (["--csv", "no-such-folder/t.csv"], "no-such-folder/t.csv"),
    (["--picture", "p.bmpx"], "p.bmpx: expected a name that ends in one of"),
    (["--original", "."], "original: expected with a packed folder"),
])
def test_command_says_what_is_wrong(model, text, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(model), "--calibration", str(text), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert message in error


def test_pictures_without_matplotlib_say_what_to_install(model, text, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(model), "--calibration", str(text), "--picture", "p.png"]) == 2
    assert "pip install 'singlequant[plots]'" in capsys.readouterr().err


def test_command_rejects_an_unknown_site(model, capsys):
    assert main(["inspect", str(model), "--site", "v"]) == 2
    assert "site: expected one of qkv, o, gate_up, down, found 'v'" in capsys.readouterr().err


# ---- the reference model ------------------------------------------------------------------------


@pytest.mark.slow
def test_singlequant_beats_hadamard_on_the_reference_model(reference_model):
    found = inspect_model(reference_model, ["hadamard", "singlequant"])
    figures = {name: np.mean([row.activation_error for row in
                              found.select(method=name, final=True)]) for name in found.methods}
    original = np.mean([row.activation_error for row in found.select(step=0, method="hadamard")])
    assert figures["singlequant"] < figures["hadamard"] < original
