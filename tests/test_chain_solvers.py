"""Chains that the core finds: angles, ART, URT and uniformity sweeps."""

import math
import threading
import time

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from singlequant import _C, _reference as reference

SEED = 7
finite = st.floats(-1e6, 1e6, allow_subnormal=False)


def assert_same_chain(found, expected, atol=1e-12):
    assert found[0].dtype == np.int32
    assert found[1].dtype == np.float64
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=atol)


# ---- angles


@given(finite, finite)
def test_givens_angle_makes_both_entries_equal(a, b):
    angle = _C.givens_angle(a, b)
    assert angle == pytest.approx(reference.givens_angle(a, b), abs=1e-15)
    target = math.hypot(a, b) * math.sqrt(0.5)
    rotated = _C.chain_apply([[0, 1]], [angle], [a, b])
    np.testing.assert_allclose(rotated, target, atol=1e-12 * max(1, target))


def test_givens_angle_rejects_nan():
    with pytest.raises(ValueError, match="b: NaN or Inf"):
        _C.givens_angle(1.0, math.nan)


# ---- ART


@pytest.mark.parametrize("n", [2, 3, 16, 101])
def test_art_extremes_matches_the_reference(rng, n):
    v = rng.standard_t(2, n)
    before = v.copy()
    found = _C.art_extremes(v, 1.5, 3 * n)
    assert_same_chain(found, reference.art_extremes(v, 1.5, 3 * n))
    np.testing.assert_array_equal(v, before)


def test_art_extremes_makes_the_pair_equal_and_meets_the_threshold(rng):
    v = rng.standard_normal(64)
    v[[3, 9]] = 6.0, -5.0
    pairs, angles = _C.art_extremes(v, 3.0, 1000)
    i, j = pairs[0]
    assert (i, j) == (3, np.argmin(np.abs(v)))
    first = _C.chain_apply(pairs[:1], angles[:1], v)
    assert first[i] == pytest.approx(first[j], abs=1e-12)
    after = _C.chain_apply(pairs, angles, v)
    assert np.abs(after).max() <= 3.0 * np.median(np.abs(v))
    assert 0 < len(pairs) < 1000


def test_art_extremes_stops_once_all_are_alike(rng):
    v = rng.standard_normal(8)  # a threshold below 1 is out of reach
    pairs, angles = _C.art_extremes(v, 0.5, 10_000)
    assert len(pairs) < 1000
    after = _C.chain_apply(pairs, angles, v)
    np.testing.assert_allclose(np.abs(after), np.linalg.norm(v) / math.sqrt(8), atol=1e-11)
    assert_same_chain((pairs, angles), reference.art_extremes(v, 0.5, 10_000))


def test_art_extremes_stops_at_the_step_limit(rng):
    assert len(_C.art_extremes(rng.standard_normal(10), 0.0, 4)[0]) == 4
    assert len(_C.art_extremes(rng.standard_normal(10), 0.0, 0)[0]) == 0


@pytest.mark.parametrize("v", [[], [3.0], [2.0, -2.0, 2.0], [0.0, 0.0]])
def test_art_extremes_leaves_what_cannot_fall(v):
    pairs, angles = _C.art_extremes(np.array(v), 0.0, 5)
    assert pairs.shape == (0, 2)
    assert angles.shape == (0,)


def test_art_extremes_rejects_bad_arguments():
    with pytest.raises(ValueError, match="v: NaN or Inf"):
        _C.art_extremes([1.0, np.nan], 1.0, 5)
    with pytest.raises(ValueError, match="threshold: expected at least 0, got nan"):
        _C.art_extremes([1.0, 2.0], np.nan, 5)
    with pytest.raises(ValueError, match="max_steps: expected 0 to .*, got -1"):
        _C.art_extremes([1.0, 2.0], 1.0, -1)
    with pytest.raises(ValueError, match="v: expected 1 dimensions, got 2"):
        _C.art_extremes([[1.0]], 1.0, 1)


@pytest.mark.parametrize("shape", [(2, 1), (2, 9), (7, 40), (31, 203)], ids=str)
def test_art_columns_matches_the_reference(rng, shape):
    columns = rng.standard_t(3, shape)
    before = columns.copy()
    found = _C.art_columns(columns, 4 * shape[0])
    assert_same_chain(found, reference.art_columns(columns, 4 * shape[0]))
    np.testing.assert_array_equal(columns, before)


def test_art_columns_lowers_the_pair_peak_at_every_step(rng):
    columns = rng.standard_t(3, (20, 500))
    pairs, angles = _C.art_columns(columns, 80)
    assert len(pairs) > 5
    state, overall = columns, np.abs(columns).max()
    for t, pair in enumerate(pairs):
        peak = np.abs(state[pair]).max()
        assert peak == overall
        state = _C.chain_apply(pairs[t : t + 1], angles[t : t + 1], state.T).T
        assert np.abs(state[pair]).max() < peak
        overall = np.abs(state).max()


def test_art_columns_equals_the_pair_at_the_peak_row():
    columns = np.array([[1.0, 8.0, 1.0], [0.5, 2.0, 0.25], [3.0, 3.0, 3.0]])
    pairs, angles = _C.art_columns(columns, 1)
    np.testing.assert_array_equal(pairs, [[0, 1]])
    after = _C.chain_apply(pairs, angles, columns.T).T
    np.testing.assert_allclose(after[:2, 1], math.hypot(8, 2) / math.sqrt(2))


def test_art_columns_does_not_count_a_step_that_lowers_nothing():
    # the second row is flat already: turning down the first row's peak raises it past that peak
    columns = np.array([[1.0, 0.9], [0.0, -0.9]])
    assert len(_C.art_columns(columns, 5)[0]) == 0
    assert len(reference.art_columns(columns, 5)[0]) == 0


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (4, 0)], ids=str)
def test_art_columns_takes_degenerate_shapes(shape):
    assert _C.art_columns(np.ones(shape), 3)[0].shape == (0, 2)


def test_art_columns_rejects_bad_arguments():
    with pytest.raises(ValueError, match="columns: NaN or Inf"):
        _C.art_columns([[1.0, np.inf], [0.0, 0.0]], 5)
    with pytest.raises(ValueError, match="max_steps: expected 0 to .*, got -2"):
        _C.art_columns([[1.0]], -2)


# ---- URT


def vectors(n):
    """Values whose squares stay in range, or 0."""
    entry = finite.map(lambda x: x if abs(x) > 1e-100 else 0.0)
    return st.lists(entry, min_size=n, max_size=n).map(np.array)


def scaled_like(u, v):
    """u with the norm of v."""
    target = u / np.abs(u).max()
    return target * (np.linalg.norm(v) / np.linalg.norm(target))


@given(st.integers(2, 12).flatmap(lambda n: st.tuples(vectors(n), vectors(n))))
def test_urt_maps_v_onto_u(pair):
    v, u = pair
    assume(u.any())
    pairs, angles = _C.urt(v, u)
    mapped = _C.chain_apply(pairs, angles, v)
    np.testing.assert_allclose(mapped, scaled_like(u, v), atol=1e-12 * np.linalg.norm(v))
    assert len(pairs) <= 2 * (len(v) - 1)
    assert_same_chain((pairs, angles), reference.urt(v, u))


@pytest.mark.parametrize("n", [86, 512])
def test_urt_maps_v_onto_a_flat_u_in_many_dimensions(rng, n):
    v, u = rng.standard_normal(n), np.sign(rng.standard_normal(n))
    chain = _C.urt(v, u)
    mapped = _C.chain_apply(*chain, v)
    np.testing.assert_allclose(mapped, scaled_like(u, v), atol=1e-12 * np.linalg.norm(v))
    assert_same_chain(chain, reference.urt(v, u))


def test_urt_makes_only_the_rotations_it_needs():
    assert len(_C.urt([3.0, 0.0, 0.0, 4.0], [1.0, 0.0, 0.0, 0.0])[0]) == 1
    assert len(_C.urt([2.0, 0.0, 0.0], [5.0, 0.0, 0.0])[0]) == 0
    pairs, angles = _C.urt([-2.0, 0.0], [1.0, 0.0])
    assert len(pairs) == 1
    np.testing.assert_allclose(_C.chain_apply(pairs, angles, [-2.0, 0.0]), [2, 0], atol=1e-12)


def test_urt_of_zero_is_empty():
    assert len(_C.urt(np.zeros(4), np.ones(4))[0]) == 0
    assert len(_C.urt(np.zeros(0), np.zeros(0))[0]) == 0
    assert len(_C.urt([-2.0], [-1.0])[0]) == 0


@pytest.mark.parametrize(("v", "u"), [([1.0, 2.0], [0.0, 0.0]), ([1.0], [-1.0])])
def test_urt_rejects_unreachable_targets(v, u):
    for twin in (_C, reference):
        with pytest.raises(ValueError, match="u: no rotation takes v onto it"):
            twin.urt(v, u)


def test_urt_rejects_bad_arguments():
    with pytest.raises(ValueError, match="v, u: NaN or Inf"):
        _C.urt([1.0, np.nan], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"u: expected shape\[0\] = 2, got 3"):
        _C.urt([1.0, 2.0], [1.0, 1.0, 1.0])


# ---- the uniformity sweep


@pytest.mark.parametrize("shape", [(2, 1), (2, 50), (3, 7), (8, 30), (13, 101)], ids=str)
@pytest.mark.parametrize("sweeps", [1, 2])
def test_uniformity_sweep_matches_the_reference(rng, shape, sweeps):
    columns = rng.standard_normal(shape)
    before = columns.copy()
    pairs, angles, after = _C.uniformity_sweep(columns, sweeps)
    expected = reference.uniformity_sweep(columns, sweeps)
    assert_same_chain((pairs, angles), expected[:2])
    np.testing.assert_allclose(after, expected[2], atol=1e-12)
    np.testing.assert_array_equal(columns, before)


@pytest.mark.parametrize("n", [2, 3, 6, 9])
def test_uniformity_sweep_meets_every_pair_once(rng, n):
    pairs, _, _ = _C.uniformity_sweep(rng.standard_normal((n, 64)))
    assert sorted(map(tuple, pairs)) == [(i, j) for i in range(n) for j in range(i + 1, n)]


def test_uniformity_sweep_lowers_the_fourth_moment_at_every_step(rng):
    columns = rng.standard_normal((12, 400))
    pairs, angles, after = _C.uniformity_sweep(columns, 2)
    state, total = columns, (columns**4).sum()
    for t in range(len(pairs)):
        state = _C.chain_apply(pairs[t : t + 1], angles[t : t + 1], state.T).T
        now = (state**4).sum()
        assert now <= total * (1 + 1e-13)
        total = now
    assert total < 0.98 * (columns**4).sum()
    np.testing.assert_allclose(state, after, atol=1e-12)


def test_uniformity_sweep_finds_the_best_angle_of_a_pair(rng):
    columns = rng.standard_normal((2, 300))
    _, angles, after = _C.uniformity_sweep(columns)
    assert abs(angles[0]) <= math.pi / 4
    tried = [
        (_C.chain_apply([[0, 1]], [angle], columns.T) ** 4).sum()
        for angle in np.linspace(-math.pi / 4, math.pi / 4, 2001)
    ]
    assert (after**4).sum() <= min(tried) * (1 + 1e-12)


def test_uniformity_sweep_of_one_token_makes_the_pair_equal():
    _, _, after = _C.uniformity_sweep([[3.0], [1.0]])
    np.testing.assert_allclose(np.abs(after), math.sqrt(5), atol=1e-12)


def test_uniformity_sweep_leaves_an_optimal_pair():
    columns = np.array([[1.0, 1.0, -2.0], [1.0, -1.0, 2.0]])
    pairs, _, after = _C.uniformity_sweep(columns)
    assert len(pairs) == 0
    np.testing.assert_array_equal(after, columns)


def test_uniformity_sweep_is_the_same_for_one_and_two_threads(rng, both_thread_counts):
    columns = rng.standard_normal((31, 1001))
    one, two = both_thread_counts(lambda: [a.tobytes() for a in _C.uniformity_sweep(columns, 2)])
    assert one == two


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (4, 0)], ids=str)
def test_uniformity_sweep_takes_degenerate_shapes(shape):
    pairs, angles, after = _C.uniformity_sweep(np.ones(shape), 2)
    assert pairs.shape == (0, 2)
    assert angles.shape == (0,)
    np.testing.assert_array_equal(after, np.ones(shape))


def test_uniformity_sweep_takes_lists_strides_and_swapped_bytes(rng):
    columns = rng.standard_normal((5, 20))
    expected = _C.uniformity_sweep(columns)
    wide = np.zeros((5, 40))
    wide[:, ::2] = columns
    for other in (columns.tolist(), wide[:, ::2], columns.astype(">f8")):
        for a, b in zip(_C.uniformity_sweep(other), expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("magnitude", [2.0**200, 2.0**-150])
def test_uniformity_sweep_works_at_both_ends_of_the_range(rng, magnitude):
    columns = rng.uniform(-1, 1, (4, 30))
    expected = _C.uniformity_sweep(columns)
    found = _C.uniformity_sweep(columns * magnitude)
    assert_same_chain(found[:2], expected[:2])


def test_uniformity_sweep_rejects_bad_arguments():
    with pytest.raises(ValueError, match="columns: NaN or Inf"):
        _C.uniformity_sweep([[1.0, np.nan], [0.0, 0.0]])
    with pytest.raises(ValueError, match="columns: a value is out of range"):
        _C.uniformity_sweep([[1e70, 1.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="sweeps: expected 0 or more .*, got -1"):
        _C.uniformity_sweep([[1.0]], -1)
    with pytest.raises(ValueError, match="columns: expected 2 dimensions, got 1"):
        _C.uniformity_sweep([1.0])


def test_uniformity_sweep_releases_the_gil(rng):
    columns = rng.standard_normal((48, 20000))
    most = 0
    for _ in range(20):  # on a busy machine this thread may sleep through a call
        worker = threading.Thread(target=_C.uniformity_sweep, args=(columns, 2))
        worker.start()
        ticks = 0
        while worker.is_alive():
            time.sleep(0.001)
            ticks += 1
        most = max(most, ticks)
        if most > 3:
            return
    pytest.fail(f"at most {most} ticks inside a call")
