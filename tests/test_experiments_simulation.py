# SPDX-License-Identifier: Apache-2.0
"""The model of rounded sites agrees with packed models, and both experiment commands run."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

import singlequant as sq
from benchmarks.experiments import closed_forms, ranges, recipes, simulation
from benchmarks.experiments.rounding import Range, round_inputs, round_transformed
from benchmarks.experiments.transforms import built, kronecker, named, principal
from singlequant import _C
from singlequant.methods.balanced import INT8_SHARE
from singlequant.sweep.texts import bundled_model, bundled_text

WINDOWS, SEQ_LEN = 4, 128
# Sums of another order and precision move a few codes by a step.
KL_TOLERANCE, PERPLEXITY_TOLERANCE = 0.03, 0.005


@pytest.fixture(scope="module")
def experiment():
    return simulation.Experiment(bundled_model(), bundled_text("heldout"), None, WINDOWS, SEQ_LEN,
                                 tokens=512)


def recipe(solver, rounding="rtn", of=None, name="a row"):
    return simulation.Recipe(name, name, solver, rounding, of or Range())


BALANCED = {
    "named": named("balanced"),
    "built": built(principal(INT8_SHARE), power=0.5),
}


# ---- against the package ------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "rounding", "clip"), [
    ("hadamard", "rtn", 1.0), ("balanced", "rtn", 0.8), ("balanced", "gptq", 0.8),
])
def test_rounded_model_gives_the_packed_models_divergence(
    experiment, tmp_path, method, rounding, clip
):
    config = sq.QuantConfig("w4a4", method, rounding, 4, clip=clip, calibration_tokens=512,
                            head_bits=16,  # the experiment rounds linears alone
                            calibration_bits=32)
    sq.quantize_folder(bundled_model(), tmp_path / "out", config)
    packed = sq.load(tmp_path / "out", kv_bits=32)  # as the experiment's own attention
    text = experiment.windows.reshape(-1)
    real = sq.perplexity(packed, text, SEQ_LEN, experiment.laboratory.original.model)
    row = recipe(named(method), rounding, Range(clip), f"{method} {rounding}")
    found = experiment.divergence(row)
    assert found.kl_mean == pytest.approx(real.kl_mean, rel=KL_TOLERANCE)
    assert found.perplexity == pytest.approx(real.perplexity, rel=PERPLEXITY_TOLERANCE)


def test_rounded_model_without_rounding_is_the_original(experiment):
    none = simulation.Transformed(experiment, named("none"))
    weights = {key: none.float_weights(key) for key in experiment.sites}
    wide = dict.fromkeys(experiment.sites, Range(bits=8))
    model = simulation.RoundedModel(experiment, none.transforms, weights, wide)
    model.site_inputs = lambda key, x: x
    expected = experiment.laboratory.original.hidden_states(experiment.windows)
    np.testing.assert_allclose(model.hidden_states(experiment.windows), expected,
                               atol=1e-4 * np.abs(expected).max())


def test_principal_of_the_packages_share_is_method_balanced(experiment):
    for site in experiment.sites.values():
        a, b = (solve(site) for solve in BALANCED.values())
        assert a.int8_inputs == b.int8_inputs
        assert a.int8_inputs > 0
        for field in ("balance", "left", "right", "left_w", "right_w"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


@pytest.mark.parametrize("name", sorted(closed_forms.solvers()))
def test_every_transformation_keeps_the_products(experiment, name):
    site = experiment.sites[1, "down"]
    transform = closed_forms.solvers()[name](site)
    y = _C.linear_dense(transform.inputs(site.heldout), transform.weights(site.weights[0]))
    np.testing.assert_allclose(y, site.outputs[0], atol=1e-4 * np.abs(site.outputs[0]).max())


# ---- ranges -------------------------------------------------------------------------------------


@pytest.fixture(name="x")
def tokens():
    return np.random.default_rng(0).standard_normal((40, 200)).astype(np.float32)


def test_round_inputs_of_each_range_keeps_to_its_grid(x):
    x_before = x.copy()
    for r in (Range(0.8), Range(asymmetric=True), Range(rms=2.5),
              Range(search=(0.9, 0.7))):
        y = round_inputs(x, r)
        assert y.shape == x.shape
        assert y.dtype == np.float32
        assert all(len(np.unique(row)) <= 16 for row in y), r
    np.testing.assert_array_equal(x, x_before)


def test_round_inputs_to_rms_has_the_step_it_says(x):  # below every maximum
    y = round_inputs(x, Range(rms=1.8))
    step = 1.8 * np.sqrt(np.mean(x**2, axis=1, keepdims=True)) / 7
    np.testing.assert_allclose(y / step, np.clip(np.rint(x / step), -8, 7), atol=1e-4)


def test_round_inputs_to_rms_never_goes_beyond_the_maximum():
    flat = np.full((2, 64), 0.5, np.float32)
    np.testing.assert_allclose(round_inputs(flat, Range(rms=2.5)), flat, rtol=1e-6)
    zero = np.zeros((2, 64), np.float32)
    np.testing.assert_array_equal(round_inputs(zero, Range(rms=2.5)), zero)


def test_search_takes_the_best_ratio_of_each_token(x):
    ratios = (0.9, 0.8, 0.7)

    def errors(r):
        return np.sum((round_inputs(x, r) - x) ** 2, axis=1)

    each = np.array([errors(Range(c)) for c in ratios])
    np.testing.assert_allclose(errors(Range(search=ratios)), each.min(axis=0), rtol=1e-5)
    assert len(set(each.argmin(axis=0))) > 1


def test_groups_have_scales_of_their_own_and_a_short_last_one(x):
    y = round_inputs(x, Range(group=64))
    np.testing.assert_array_equal(y[:, 192:], round_inputs(x[:, 192:].copy(), Range()))
    np.testing.assert_array_equal(y[:, :64], round_inputs(x[:, :64].copy(), Range()))
    assert Range(group=64).segments(200) == 4


def test_block_of_8_bits_is_rounded_apart(x):
    y = round_transformed(x, 64, Range(0.8))
    assert np.abs(y[:, :64] - x[:, :64]).max() < 0.02
    np.testing.assert_array_equal(y[:, 64:], round_inputs(x[:, 64:].copy(), Range(0.8)))


def test_cost_counts_sums_and_products(experiment):
    plain = simulation.cost(experiment, recipe(named("hadamard"), name="hadamard"))
    assert plain == {"passes": 2, "roundings": 1, "accumulations": 1, "products_8bit": 0,
                     "corrections": 0, "bits": 4}
    row = recipe(BALANCED["built"], of=Range(search=(0.9, 0.8, 0.7), group=64), name="block")
    cost, found = simulation.cost(experiment, row), experiment.transformed(row)
    assert (cost["passes"], cost["roundings"]) == (3, 4)
    sums = outputs = 0
    for key, site in experiment.sites.items():
        k, leading = site.heldout.shape[1], found.transforms[key].int8_inputs
        for w in site.weights:
            sums, outputs = sums + len(w) * (1 + math.ceil((k - leading) / 64)), outputs + len(w)
    assert cost["accumulations"] == pytest.approx(sums / outputs)
    assert 0.2 < cost["products_8bit"] < 0.4


# ---- closed forms -------------------------------------------------------------------------------


def test_axis_balance_makes_both_gram_matrices_equal(experiment):
    site = experiment.sites[0, "down"]
    x, w = site.statistics.inputs, site.weights[0]
    k1, k2 = site.statistics.k1, site.statistics.k2
    found = closed_forms.axis_balance(site.statistics, x, w)
    sides = [np.ascontiguousarray(a, np.float32)
             for a in (found.left, found.right, found.left_w, found.right_w)]
    # the second axis was balanced last
    x_gram, w_gram = (np.einsum("tij,tik->jk", *[rows.reshape(-1, k1, k2).astype(float)] * 2)
                      for rows in (kronecker(x, *sides[:2]),
                                   kronecker(w, *sides[2:])))
    x_gram, w_gram = x_gram / np.trace(x_gram), w_gram / np.trace(w_gram)
    assert np.linalg.norm(x_gram - w_gram) < 0.01 * np.linalg.norm(w_gram)


def test_predicted_errors_are_those_of_rounding(experiment):
    found = simulation.Transformed(experiment, named("hadamard"))
    for key, predicted in closed_forms.predicted_errors(found, 1.0).items():
        y = found.transforms[key].inputs(experiment.sites[key].statistics.sample)
        w = np.concatenate(found.float_weights(key))
        noise = (round_inputs(y, Range()) - y) @ w.T
        measured = np.sum(noise**2) / np.sum((y @ w.T) ** 2)
        assert predicted == pytest.approx(measured, rel=0.25), key


def test_baq_bits_have_equal_marginal_losses_and_the_mean():
    losses, shares = np.array([4.0, 1.0, 0.5]), np.array([0.2, 0.3, 0.5])
    bits = closed_forms.baq_bits(losses, shares, 4.5)
    marginal = losses * 4.0 ** (4 - bits) / shares
    np.testing.assert_allclose(marginal, marginal[0])
    assert np.sum(shares * bits) == pytest.approx(4.5)


@pytest.mark.parametrize("weighted", [True, False])
def test_two_levels_keep_the_budget_and_use_it(experiment, weighted):
    found = simulation.Transformed(experiment, named("hadamard"))
    chosen = closed_forms.two_levels(4.5, 1.0, weighted)(found)
    k = {key: site.heldout.shape[1] for key, site in experiment.sites.items()}
    mean = sum(k[key] * r.bits for key, r in chosen.items()) / sum(k.values())
    assert 4.5 - 4 * min(k.values()) / sum(k.values()) < mean <= 4.5


# ---- commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "only"), [
    (ranges, "*clip 0.8"), (ranges, "clip per site"), (closed_forms, "balance, *1/8 at 8*rtn"),
    (closed_forms, "*4.5 bits*rtn"),
])
def test_command_writes_tables_and_resumes(tmp_path, capsys, monkeypatch, command, only):
    name, argv = command.NAME, ["--quick", "--only", only, "--out", str(tmp_path)]
    command.main(argv)
    table = json.loads((tmp_path / f"{name}.json").read_text())
    assert table["command"].startswith(f"python -m benchmarks.experiments.{name} --quick")
    names = [row["name"] for row in table["rows"]]
    assert names[0] == recipes.BASELINE.name
    assert len(names) >= 2
    assert all(row["kl"] > 0 and 0 < row["top1"] <= 1 for row in table["rows"])
    for row in table["rows"]:
        assert row["ratio"] == pytest.approx(row["kl"] / table["rows"][0]["kl"])
    with (tmp_path / f"{name}.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == names
    lines = (tmp_path / f"{name}.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == len(names) + 2

    log = tmp_path / f"{name}.jsonl"
    finished = log.read_text().splitlines()
    log.write_text("\n".join(finished[:-1]) + "\n" + finished[-1][:20])  # killed while it wrote
    measured = []
    monkeypatch.setattr(command, "measure", lambda e, r: measured.append(r.name) or {})
    command.main(argv)
    assert measured == names[-1:]
    again = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    assert again[:-1] == table["rows"][:-1]
    assert again[-1]["kl"] == table["rows"][-1]["kl"]
    capsys.readouterr()


def test_commands_refuse_what_does_not_fit(capsys):
    with pytest.raises(SystemExit, match="--only: expected a pattern that matches a row"):
        ranges.main(["--quick", "--only", "no such row"])
    with pytest.raises(SystemExit, match="2"):
        ranges.main(["--windows", "0"])
    assert "argument --windows: expected integers of at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="text: expected 1000 windows of 512 tokens, found"):
        closed_forms.main(["--windows", "1000"])


@pytest.mark.parametrize("command", [ranges, closed_forms])
def test_rows_have_names_of_their_own(command):
    names = [recipe.name for recipe in command.recipes()]
    assert len(names) == len(set(names))
    assert recipes.BASELINE.name in names
    assert all(math.isfinite(len(name)) for name in names)


def test_texts_default_to_the_bundled_ones(experiment):
    ids = experiment.checkpoint.encode(bundled_text("heldout"))
    np.testing.assert_array_equal(experiment.windows.reshape(-1), ids[: WINDOWS * SEQ_LEN])
