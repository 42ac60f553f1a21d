"""Sampling, likelihood and divergence of the C core against their NumPy twins."""

import numpy as np
import pytest

from singlequant import _C, _reference as reference


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# ---- sampling -----------------------------------------------------------------------------------


def test_sample_argmax_takes_lowest_index_of_a_tie():
    assert _C.sample([1.0, 3.0, 2.0, 3.0], 0, 0, 1, 0.99) == 1
    assert _C.sample([-np.inf, -5.0, -np.inf], 0, 0, 1, 0) == 1


@pytest.mark.parametrize("top_k", [0, 1, 3, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_sample_sweep_of_uniform_gives_the_distribution(rng, temperature, top_p, top_k):
    logits = rng.normal(size=12).astype(np.float32) * 2
    grid = (np.arange(4000) + 0.5) / 4000
    drawn = np.array([_C.sample(logits, temperature, top_k, top_p, u) for u in grid])
    order, p = reference.distribution(logits, temperature, top_k, top_p)
    counts = np.bincount(drawn, minlength=12)
    expected = np.zeros(12)
    expected[order] = p * 4000
    # a cell of the grid belongs to one token: each count is off by less than the two cells cut
    assert np.abs(counts - expected).max() <= 1 + 1e-6
    assert set(np.flatnonzero(counts)) <= set(order)
    # descending order of probability along uniform
    rank = np.empty(12, int)
    rank[order] = np.arange(len(order))
    assert (np.diff(rank[drawn]) >= 0).all()


@pytest.mark.parametrize("v", [1, 2, 7, 1000])
def test_sample_agrees_with_twin(rng, v):
    for _ in range(50):
        logits = rng.normal(size=v).astype(np.float32) * 3
        temperature, top_p = rng.uniform(0.1, 2), rng.uniform(0.05, 1)
        top_k, uniform = int(rng.integers(0, v + 2)), rng.uniform()
        assert _C.sample(logits, temperature, top_k, top_p, uniform) == reference.sample(
            logits, temperature, top_k, top_p, uniform
        )


@pytest.mark.parametrize("kind", ["flat", "nearly equal", "two values", "wide", "denormal"])
def test_sample_of_a_large_vocabulary_agrees_with_twin(rng, kind):
    """Many tokens share the leading bits of their weights, or all of them."""
    v = 20_000
    logits = {
        "flat": rng.standard_normal(v) / 2, "nearly equal": rng.standard_normal(v) * 1e-6,
        "two values": rng.integers(0, 2, v), "wide": rng.uniform(-600, 0, v),
        "denormal": np.where(np.arange(v) == v // 2, 0, rng.uniform(-745, -708, v)),
    }[kind].astype(np.float32)
    for top_k, top_p in ((0, 1.0), (40, 1.0), (5000, 1.0), (0, 0.9), (7000, 0.473)):
        for uniform in rng.random(8):
            found = _C.sample(logits, 1.0, top_k, top_p, uniform)
            assert found == reference.sample(logits, 1.0, top_k, top_p, uniform)


def test_sample_equal_logits_walk_in_index_order():
    drawn = [_C.sample(np.zeros(8), 1, 0, 1, (i + 0.5) / 8) for i in range(8)]
    assert drawn == list(range(8))
    assert {_C.sample(np.zeros(8), 1, 3, 1, u) for u in np.linspace(0, 0.999, 50)} == {0, 1, 2}


def test_sample_top_p_keeps_the_token_that_crosses():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert {_C.sample(logits, 1, 0, 0.6, u) for u in np.linspace(0, 0.999, 100)} == {0, 1}
    assert {_C.sample(logits, 1, 0, 0.4, u) for u in np.linspace(0, 0.999, 100)} == {0}


def test_sample_never_draws_a_masked_token():
    logits = [0.0, -np.inf, 0.0, -np.inf]
    assert {_C.sample(logits, 1, 0, 1, u) for u in np.linspace(0, 1 - 1e-16, 100)} == {0, 2}
    assert _C.sample(logits, 1e-30, 0, 1, 0.9999999) == 2


@pytest.mark.parametrize("bad", [[0.0, np.nan], [np.nan, 0.0], [0.0, np.inf], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0, 1])
def test_sample_rejects_nonfinite_logits(bad, temperature):
    with pytest.raises(ValueError, match=r"NaN|finite"):
        _C.sample(bad, temperature, 0, 1, 0.5)


@pytest.mark.parametrize(
    "arguments",
    [
        (-1, 0, 1, 0.5),
        (np.nan, 0, 1, 0.5),
        (1, -1, 1, 0.5),
        (1, 0, 0, 0.5),
        (1, 0, 1.5, 0.5),
        (1, 0, 1, 1.0),
        (1, 0, 1, -0.1),
    ],
)
def test_sample_rejects_values_out_of_range(arguments):
    with pytest.raises(ValueError, match="sample"):
        _C.sample([1.0, 2.0], *arguments)


def test_sample_rejects_no_logits():
    with pytest.raises(ValueError, match="sample"):
        _C.sample(np.zeros(0), 0, 0, 1, 0)


@pytest.mark.parametrize("m", [0, 1, 7])
@pytest.mark.parametrize("options", [(1, 0, 1), (0.7, 20, 0.9), (0, 0, 1)])
def test_sample_rows_is_sample_of_each_row_at_any_number_of_threads(
    rng, both_thread_counts, m, options
):
    logits, uniform = 3 * rng.standard_normal((m, 500)).astype(np.float32), rng.random(m)
    expected = [_C.sample(row, *options, u) for row, u in zip(logits, uniform, strict=True)]
    for found in both_thread_counts(lambda: _C.sample_rows(logits, *options, uniform)):
        assert found.dtype == np.int64
        assert found.tolist() == expected


def test_sample_rows_rejects_what_sample_rejects(rng):
    logits, uniform = rng.standard_normal((4, 9)), np.full(4, 0.5)
    for row in range(4):
        bad = logits.copy()
        bad[row, 3] = np.nan
        with pytest.raises(ValueError, match=r"sample_rows: .*(NaN|finite)"):
            _C.sample_rows(bad, 1, 0, 1, uniform)
        with pytest.raises(ValueError, match="sample_rows"):
            _C.sample_rows(logits, 1, 0, 1, np.where(np.arange(4) == row, 1.0, 0.5))
    with pytest.raises(ValueError, match="uniform"):
        _C.sample_rows(logits, 1, 0, 1, uniform[:3])
    with pytest.raises(ValueError, match="sample_rows"):
        _C.sample_rows(np.zeros((2, 0)), 1, 0, 1, uniform[:2])


# ---- likelihood and divergence ------------------------------------------------------------------


@pytest.mark.parametrize(("m", "v"), [(1, 1), (3, 17), (40, 1000)])
def test_negative_log_likelihood_equals_twin(rng, m, v):
    logits = rng.normal(size=(m, v)).astype(np.float32) * 5 + 100
    target = rng.integers(0, v, m)
    nll = _C.negative_log_likelihood(logits, target)
    assert nll.dtype == np.float64
    np.testing.assert_allclose(
        nll, reference.negative_log_likelihood(logits, target), rtol=1e-12, atol=1e-12
    )


def test_negative_log_likelihood_survives_large_logits():
    nll = _C.negative_log_likelihood([[1e30, 0.0], [-1e30, 0.0]], [0, 0])
    np.testing.assert_allclose(nll, [0, 1e30], rtol=1e-6)


def test_negative_log_likelihood_shows_nan(rng):
    assert np.isnan(_C.negative_log_likelihood([[0.0, np.nan, 1.0]], [0])).all()


def test_negative_log_likelihood_names_bad_target():
    with pytest.raises(ValueError, match=r"target\[1\]: expected 0 to 3, got 4"):
        _C.negative_log_likelihood(np.zeros((2, 4)), [0, 4])
    with pytest.raises(ValueError, match=r"target: expected shape\[0\] = 2, got 3"):
        _C.negative_log_likelihood(np.zeros((2, 4)), [0, 1, 2])


@pytest.mark.parametrize(("m", "v"), [(1, 1), (3, 17), (40, 1000)])
def test_kl_divergence_equals_twin(rng, m, v):
    p = rng.normal(size=(m, v)).astype(np.float32) * 3
    q = p + rng.normal(size=(m, v)).astype(np.float32) * 0.1
    kl, same = _C.kl_divergence(p, q)
    expected, expected_same = reference.kl_divergence(p, q)
    np.testing.assert_allclose(kl, expected, rtol=1e-9, atol=1e-14)
    assert same.dtype == np.bool_
    np.testing.assert_array_equal(same, expected_same)


def test_kl_divergence_of_equal_rows_is_zero_and_shift_does_not_matter(rng):
    p = rng.integers(-8, 8, size=(4, 64)).astype(np.float32)
    kl, same = _C.kl_divergence(p, p + 16)
    assert (kl == 0).all()
    assert same.all()


def test_kl_divergence_of_masked_tokens():
    kl, _ = _C.kl_divergence([[0.0, -np.inf, 0.0]], [[0.0, -np.inf, 0.0]])
    assert kl[0] == 0
    kl, _ = _C.kl_divergence([[0.0, 0.0]], [[0.0, -np.inf]])
    assert kl[0] == np.inf


def test_figures_do_not_depend_on_threads(rng):
    p, q = rng.normal(size=(2, 33, 500)).astype(np.float32)
    target = rng.integers(0, 500, 33)
    seen = set()
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        kl, same = _C.kl_divergence(p, q)
        nll = _C.negative_log_likelihood(p, target)
        seen.add((kl.tobytes(), same.tobytes(), nll.tobytes()))
    assert len(seen) == 1


def test_figures_of_no_tokens_are_empty():
    assert _C.negative_log_likelihood(np.zeros((0, 4)), np.zeros(0, int)).shape == (0,)
    kl, same = _C.kl_divergence(np.zeros((0, 4)), np.zeros((0, 4)))
    assert kl.shape == same.shape == (0,)
