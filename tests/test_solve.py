"""Rotations of a site: orthogonal, exact, and what each method promises."""

import numpy as np
import pytest

import singlequant as sq
from singlequant import artifacts
from singlequant.artifacts import SiteStatistics
from singlequant.calibrate import site_statistics
from singlequant.rotate import METHODS, solve_site


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 7, 64, 172, 509, 512, 1408])
def test_factors_are_orthogonal(method, k):
    rotation = solve_site(statistics(k), method)
    for factor in (rotation.left, rotation.right):
        m = factor.matrix()
        np.testing.assert_allclose(m @ m.T, np.eye(factor.order), atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [64, 172, 509, 521])
def test_rotating_both_sides_leaves_the_product(method, k):
    x = outlier_inputs(k).astype(np.float32)
    w = np.random.default_rng(1).standard_normal((5, k)).astype(np.float32)
    rotation = solve_site(statistics(k), method)
    sides = rotation.left.runtime(), rotation.right.runtime()
    y = sq.rotate(x, *sides).astype(np.float64) @ sq.rotate(w, *sides).astype(np.float64).T
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
    for method in METHODS:
        rotation = solve_site(site, method)
        ratio[method] = peak_to_rms(
            sq.rotate(site.sample, rotation.left.runtime(), rotation.right.runtime())
        )
    assert max(v for m, v in ratio.items() if m != "none") < ratio["none"]
    assert ratio["singlequant"] < ratio["hadamard"]


def test_counts_say_what_each_method_did():
    counts = {m: solve_site(statistics(512), m) for m in METHODS}
    for method, r in counts.items():
        assert (r.left.steps + r.right.steps
                == r.art_steps + r.urt_steps + r.sweep_rotations), method
    assert counts["none"].is_identity
    assert counts["art"].art_steps > 0
    assert counts["art"].urt_steps == 0
    assert counts["urt"].art_steps == 0
    assert counts["urt"].urt_steps > 0
    assert counts["paper"].art_steps > 0
    assert counts["paper"].urt_steps > 0
    assert counts["singlequant"].sweep_rotations > 0


@pytest.mark.parametrize("method", METHODS)
def test_same_statistics_give_the_same_bytes_at_any_thread_count(method):
    sq.set_num_threads(1)
    a = solve_site(statistics(512), method)
    sq.set_num_threads(3)
    b = solve_site(statistics(512), method)
    for side in ("left", "right"):
        np.testing.assert_array_equal(getattr(a, side).pairs, getattr(b, side).pairs)
        np.testing.assert_array_equal(getattr(a, side).angles, getattr(b, side).angles)


def test_all_zero_inputs_are_solved():
    site = site_statistics(np.zeros((8, 64), np.float32), [np.zeros((4, 64), np.float32)])
    for method in METHODS:
        m = solve_site(site, method).left.matrix()
        np.testing.assert_allclose(m @ m.T, np.eye(8), atol=1e-12)


def test_recipes_name_exactly_these_methods():
    assert set(artifacts.METHODS) == set(METHODS)


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match="method: expected one of .*, got 'magic'"):
        solve_site(statistics(64), "magic")
