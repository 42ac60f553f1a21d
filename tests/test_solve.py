"""Rotations of a site: orthogonal, exact, and what each method promises."""

import functools
from dataclasses import replace

import numpy as np
import pytest

import singlequant as sq
from singlequant import _reference, config
from singlequant.config import QuantConfig
from singlequant.methods import singlequant
from singlequant.methods.registry import METHODS
from singlequant.methods.solve import solve_layer, solve_site
from singlequant.rotations import Factor, SiteRotation
from singlequant.rows import rotate_rows
from singlequant.statistics import SiteStatistics
from singlequant.sweep.calibrate import site_statistics
from singlequant.sweep.layer import int8_inputs_of, transform_inputs, transform_rows

ONLINE = [name for name, row in METHODS.items() if not row.residual]
KRONECKER = [method for method in ONLINE if method != "duquant"]
PARTS = ("aligned-o", "aligned-down")  # of `aligned`, built by the same code


def outlier_inputs(k: int, tokens: int = 96, seed: int = 0) -> np.ndarray:
    """Gaussian tokens with two large channels and one massive value."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, k))
    x[:, rng.permutation(k)[: max(1, k // 40)]] *= 12
    x[tokens // 2, k // 3] = 300
    return x.astype(np.float32)


def statistics(k: int) -> SiteStatistics:
    weights = np.random.default_rng(1).standard_normal((80, k)).astype(np.float32)
    return site_statistics(outlier_inputs(k), [weights])


@pytest.mark.parametrize("method", [m for m in KRONECKER if m not in PARTS])
@pytest.mark.parametrize("k", [1, 7, 64, 172, 509, 512, 1408])
def test_factors_are_orthogonal(method, k):
    rotation = solve_site(statistics(k), method)
    for factor in (rotation.left, rotation.right):
        m = factor.matrix()
        np.testing.assert_allclose(m @ m.T, np.eye(factor.order), atol=1e-12)


@pytest.mark.parametrize("k", [1, 64, 172, 1408])
def test_singlequant_takes_the_arrangement_that_rounding_harms_least(k):
    site = statistics(k)
    errors = {}
    for arrangement in singlequant.ARRANGEMENTS:
        rotation = solve_site(site, functools.partial(singlequant.build, **arrangement))
        x, w = (rotate_rows(part, rotation) for part in (site.sample, site.weights))
        y = _reference.dequantize(*_reference.quantize(x)[:2]) @ _reference.dequantize(
            *_reference.quantize(w)[:2]).T
        error = np.sum((y.astype(np.float64) - x @ w.T) ** 2)
        assert singlequant.rounding_error(site, rotation) == pytest.approx(error, rel=1e-2)
        errors[error] = rotation
    found, best = solve_site(site, "singlequant"), errors[min(errors)]
    np.testing.assert_array_equal(found.left.angles, best.left.angles)
    np.testing.assert_array_equal(found.right.angles, best.right.angles)
    assert found.steps == best.steps


@pytest.mark.parametrize("method", [m for m in ONLINE if m not in PARTS])
@pytest.mark.parametrize("k", [64, 172, 509, 521])
def test_rotating_both_sides_leaves_the_product(method, k):
    x = outlier_inputs(k).astype(np.float32)
    w = np.random.default_rng(1).standard_normal((5, k)).astype(np.float32)
    rotation = solve_site(statistics(k), method)
    plain = replace(rotation, balance=None)
    y = transform_inputs(x, plain).astype(np.float64) @ transform_rows(w, plain).astype(float).T
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    assert np.abs(y - exact).max() <= 1e-5 * np.abs(exact).max()


def test_large_prime_site_keeps_chains_instead_of_a_matrix():
    rotation = solve_site(statistics(1009), "singlequant")
    assert isinstance(rotation.left.runtime(), tuple)
    assert rotation.left.steps < 10 * 1009


def peak_to_rms(x: np.ndarray) -> float:
    return float(np.mean(np.abs(x).max(1) / np.sqrt((x.astype(np.float64) ** 2).mean(1))))


def test_every_transformation_flattens_outliers_and_singlequant_most():
    site = statistics(512)
    ratio = {}
    for method in ONLINE:
        rotation = solve_site(replace(site, reads="residual"), method)
        balance = 1 if rotation.balance is None else rotation.balance
        ratio[method] = peak_to_rms(rotate_rows(site.sample / balance, rotation))
    acting = [m for m in ONLINE if METHODS[m].rotates or METHODS[m].balances]
    assert max(ratio[m] for m in acting) < ratio["none"]
    assert ratio["singlequant"] < ratio["hadamard"]


def test_counts_say_what_each_method_did():
    counts = {m: solve_site(statistics(512), m) for m in KRONECKER}
    for method, r in counts.items():
        named = sum(r.givens_count(kind) for kind in ("ART", "URT", "sweep"))
        steps = r.left.steps + r.right.steps
        assert (steps > named) == (method == "random" or METHODS[method].int8_inputs), method
        assert steps == sum(step.count for step in r.steps), method
        for axis, factor in enumerate((r.left, r.right)):
            assert factor.steps == sum(s.count for s in r.steps if s.axis == axis)
            assert factor.hadamard == any(s.hadamard for s in r.steps if s.axis == axis)
    assert counts["none"].is_identity
    assert counts["art"].givens_count("ART") > 0
    assert counts["art"].givens_count("URT") == 0
    assert counts["urt"].givens_count("ART") == 0
    assert counts["urt"].givens_count("URT") > 0
    assert counts["paper"].givens_count("ART") > 0
    assert counts["paper"].givens_count("URT") > 0
    assert counts["singlequant"].givens_count("sweep") > 0


@pytest.mark.parametrize("method", ONLINE)
def test_same_statistics_give_the_same_bytes_at_any_thread_count(method):
    sq.set_num_threads(1)
    a = solve_site(statistics(512), method)
    sq.set_num_threads(3)
    b = solve_site(statistics(512), method)
    for x, y in zip(a.core.parts, b.core.parts, strict=True):
        np.testing.assert_array_equal(x, y)


def test_all_zero_inputs_are_solved():
    site = site_statistics(np.zeros((8, 64), np.float32), [np.zeros((4, 64), np.float32)])
    for method in KRONECKER:
        m = solve_site(site, method).left.matrix()
        np.testing.assert_allclose(m @ m.T, np.eye(8), atol=1e-12)


# ---- balanced: principal directions at 8 bits -------------------------------------------------


def low_rank_statistics(k: int, rank: int = 3) -> SiteStatistics:
    """Tokens with most of their energy in a few directions of no channel's own."""
    rng = np.random.default_rng(k)
    x = rng.standard_normal((96, k)) + 5 * rng.standard_normal((96, rank)) @ rng.standard_normal(
        (rank, k)
    )
    return site_statistics(x.astype(np.float32), [rng.standard_normal((80, k)).astype(np.float32)])


@pytest.mark.parametrize("k", [64, 172, 256, 289, 768])
def test_int8_inputs_of_hold_the_most_energy_an_orthogonal_factor_can_give_them(k):
    site = low_rank_statistics(k)
    rotation = solve_site(site, "balanced")
    assert rotation.int8_inputs > 0
    balanced = site.sample / rotation.balance
    rotated = rotate_rows(balanced, rotation).astype(np.float64)
    energy = np.sum(rotated**2, axis=0)
    size = rotation.int8_inputs
    blocks = energy[: k // size * size].reshape(-1, size).sum(1)
    assert np.argmax(blocks) == 0
    # Ky Fan: no `count` orthonormal directions of the first axis hold more than the largest
    # eigenvalues of its Gram matrix.
    tokens = balanced.astype(np.float64).reshape(-1, site.k1, site.k2)
    gram = np.einsum("tij,tkj->ik", tokens, tokens)
    most = np.linalg.eigvalsh(gram)[-(rotation.int8_inputs // site.k2) :].sum()
    assert energy[: rotation.int8_inputs].sum() == pytest.approx(most, rel=1e-5)


@pytest.mark.parametrize("k", [64, 96, 128, 172, 256, 1000, 1408, 4096])
def test_int8_inputs_of_are_whole_blocks_of_both_the_axis_and_the_kernels(k):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 40, k)).astype(np.float32)
    site = site_statistics(x, [w])
    high = solve_site(site, "balanced").int8_inputs
    assert 0 < high <= k // 2
    assert high % config.INT8_STEP == 0
    assert high % site.k2 == 0
    assert abs(high - k / 4) <= max(np.lcm(site.k2, config.INT8_STEP), k / 16)


@pytest.mark.parametrize("k", [1, 2, 7, 31, 32, 40, 521, 1042])
def test_sites_too_small_or_prime_get_no_int8_inputs_of_and_the_plain_arrangement(k):
    site = statistics(k)
    rotation = solve_site(site, "balanced")
    assert rotation.int8_inputs == 0
    balanced = replace(site, sample=site.sample / rotation.balance,
                       weights=site.weights * rotation.balance)
    expected = solve_site(balanced, functools.partial(singlequant.build, art="no"))
    for side in ("left", "right"):
        found = getattr(rotation, side)
        assert found.hadamard == getattr(expected, side).hadamard
        np.testing.assert_array_equal(found.angles, getattr(expected, side).angles)


@pytest.mark.parametrize(("group", "high", "expected"), [
    (0, 96, 96), (32, 96, 96), (64, 96, 64), (96, 96, 96), (128, 96, 0), (128, 384, 384),
    (256, 384, 256), (64, 0, 0),
])  # fmt: skip
def test_int8_inputs_of_are_cut_to_whole_weight_groups(group, high, expected):
    rotation = SiteRotation(Factor.identity(24), Factor.identity(32), int8_inputs=high)
    assert int8_inputs_of(rotation, QuantConfig("w4a4", bits=4, group_size=group)) == expected
    for scheme in ("w4a8", "w4a16"):  # nothing to raise
        assert int8_inputs_of(rotation, QuantConfig(bits=4, scheme=scheme, group_size=group)) == 0


@pytest.mark.parametrize("high", [-32, 16, 64, 96])
def test_rotation_refuses_int8_inputs_of_of_no_whole_block(high):
    message = f"int8_inputs: expected a multiple of 32 below 64, found {high}"
    with pytest.raises(ValueError, match=message):
        SiteRotation(Factor.identity(8), Factor.identity(8), int8_inputs=high)


@pytest.mark.parametrize(("options", "stored"), [
    ({}, 4), ({"group_size": 32}, 4), ({"group_size": 128}, 0), ({"scheme": "w4a8"}, 0),
    ({"scheme": "w4a16"}, 0), ({"ignore": ("*.mlp.*",)}, 2), ({"method": "singlequant"}, 0),
])  # fmt: skip
def test_folder_stores_int8_inputs_of_where_they_count(make_checkpoint, tmp_path, options, stored):
    path = make_checkpoint(tmp_path / "m", hidden=128, intermediate=256, layers=1)
    checkpoint = sq.load_checkpoint(path)
    config = QuantConfig(**{"scheme": "w4a4", "bits": 4, "method": "balanced", **options})
    statistics = sq.calibrate(checkpoint, np.arange(96).reshape(2, 48))
    rotations = sq.solve_rotations(statistics, config.method)
    out = sq.save(sq.quantize(checkpoint, rotations, config), tmp_path / "out", checkpoint, config)
    packed = sq.load_checkpoint(out)
    assert sum(name.endswith(".high") for name in packed.tensors) == stored
    assert sum(high > 0 for high in packed.layer(0).int8_inputs.values()) == stored
    assert np.isfinite(sq.load(out).forward(np.arange(9)[None])).all()


# ---- random -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [64, 172, 127])
def test_random_is_another_rotation_for_each_seed_and_axis(k):
    site = statistics(k)
    first, again, second = (solve_site(site, "random", seed) for seed in (0, 0, 1))
    for side in ("left", "right"):
        a, b, c = (getattr(r, side).matrix() for r in (first, again, second))
        np.testing.assert_array_equal(a, b)
        assert len(a) == 1 or np.abs(a - c).max() > 0.1
    if site.k1 == site.k2:
        assert np.abs(first.left.matrix() - first.right.matrix()).max() > 0.1


def test_random_is_the_orthogonal_matrix_of_its_seed():
    rotation = solve_site(statistics(256), "random", 3)
    for axis, factor in enumerate((rotation.left, rotation.right)):
        expected = _reference.random_orthogonal(16, 6 + axis)
        expected[-1] *= np.sign(np.linalg.det(expected))  # rotations have determinant 1
        np.testing.assert_allclose(factor.matrix(), expected, atol=1e-12)


@pytest.mark.parametrize("method", [m for m in ONLINE if m not in ("random", "duquant")])
def test_other_methods_do_not_depend_on_the_seed(method):
    a, b = (solve_site(statistics(64), method, seed) for seed in (0, 1))
    for x, y in zip(a.core.parts, b.core.parts, strict=True):
        np.testing.assert_array_equal(x, y)


def test_layer_tells_each_site_its_name(make_checkpoint, tmp_path):
    """smoothquant balances where a norm feeds the linears, and nothing else."""
    checkpoint = sq.load_checkpoint(make_checkpoint(tmp_path / "m", layers=1))
    layer = next(sq.calibrate(checkpoint, np.arange(64).reshape(2, 32)))
    sites = solve_layer(layer, "smoothquant").sites
    assert {name for name, r in sites.items() if r.balance is not None} == {"qkv", "gate_up"}
    assert all(r.is_identity for r in sites.values())


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match="method: expected one of .*, found 'magic'"):
        solve_site(statistics(64), "magic")
