"""The predicted gain of balance and alignment: against its twin, and against measured noise."""

from dataclasses import replace

import numpy as np
import pytest

import singlequant as sq
from singlequant import _C, _reference as reference
from singlequant.methods import gain
from singlequant.methods.align import DAMPING, align_site
from singlequant.methods.balance import rms_balance
from singlequant.methods.gain import alignment_gain, balance_gain
from singlequant.rotations import Factor, SiteRotation
from singlequant.sweep.calibrate import site_statistics
from singlequant.sweep.layer import transform_inputs, transform_rows

K = 48


def made(rows, k, spread, seed):
    """Rows whose channels are of different sizes and correlated inside blocks of 8 channels."""
    rng = np.random.default_rng(seed)
    mix = np.kron(np.eye(k // 8), np.ones((8, 8))) * rng.standard_normal((k, k))
    mix *= np.exp(spread * rng.standard_normal(k))
    return (rng.standard_normal((rows, k)) @ mix).astype(np.float32)


X, W = made(1500, K, 1.0, 0), made(300, K, 0.7, 1)


@pytest.fixture
def site():
    return site_statistics(X, [W])


def decibels(before, after):
    return 10 * np.log10(before / after)


def energy(x):
    return float(np.sum(x.astype(np.float64) ** 2))


def test_block_energy_equals_its_twin_and_that_of_the_rows(site):
    m, _ = _C.align_blocks(site.gram, site.weight_gram, DAMPING)
    found = _C.block_energy(site.gram, m)
    np.testing.assert_allclose(found, reference.block_energy(site.gram, m), rtol=1e-12)
    b = site.block
    turned = np.einsum("tni,nij->tnj", X.reshape(len(X), K // b, b).astype(np.float64), m)
    np.testing.assert_allclose(found, np.sum(turned**2, axis=(0, 2)), rtol=1e-5)


@pytest.mark.parametrize(("gram", "m", "message"), [
    (np.ones((2, 3, 4)), np.ones((2, 3, 3)), r"gram: expected shape\[2\] = 3, got 4"),
    (np.ones((2, 3, 3)), np.ones((1, 3, 3)), r"m: expected shape\[0\] = 2, got 1"),
    (np.ones((2, 3, 3)), np.ones((2, 4, 3)), r"m: expected shape\[1\] = 3, got 4"),
    (np.ones((2, 3, 3)), np.full((2, 3, 3), np.inf), "gram, m: .*Inf"),
    (np.ones((1, 0, 0)), np.ones((1, 0, 0)), "gram: expected blocks of 1 to 4096 channels, got 0"),
])
def test_block_energy_names_what_it_refuses(gram, m, message):
    with pytest.raises(ValueError, match=message):
        _C.block_energy(gram, m)


def test_gain_equals_its_twin(site):
    m, inverse_t = reference.align_blocks(site.gram, site.weight_gram, DAMPING)
    before = energy(X) * energy(W)
    after = (reference.block_energy(site.gram, m).sum()
             * reference.block_energy(site.weight_gram, inverse_t).sum())
    assert alignment_gain(site) == pytest.approx(decibels(before, after), abs=1e-4)


def test_gain_reaches_the_least_product_but_for_the_damping(site, monkeypatch):
    least = decibels(energy(X) * energy(W),
                     reference.aligned_energy(site.gram, site.weight_gram))
    assert least - 0.5 < alignment_gain(site) < least
    monkeypatch.setattr(gain, "DAMPING", 1e-6)
    assert alignment_gain(site) == pytest.approx(least, abs=0.1)


def test_balance_is_the_gain_of_blocks_of_one_channel(site):
    sums = np.sum(X.astype(np.float64) ** 2, axis=0), np.sum(W.astype(np.float64) ** 2, axis=0)
    least = reference.aligned_energy(*(s.reshape(-1, 1, 1) for s in sums))
    expected = decibels(sums[0].sum() * sums[1].sum(), least)
    assert balance_gain(site) == pytest.approx(expected, abs=1e-4)
    assert balance_gain(site) < alignment_gain(site)


def noise(s, **before):
    """Energy of the outputs' errors in 4 bits, behind a Hadamard, which spreads the errors."""
    align = before.get("align")
    plain = np.zeros((0, 2), np.int32), np.zeros(0)
    right = Factor.identity(s.k2) if align and align.folded else Factor(s.k2, True, *plain)
    rotation = SiteRotation(Factor(s.k1, True, *plain), right, **before)
    x, w = transform_inputs(s.sample, rotation), transform_rows(s.weights, rotation)
    codes, scales, _ = _C.quantize(w)
    found = _C.linear(x, _C.PackedWeight(_C.pack(codes), scales, s.k1 * s.k2), 4)
    return energy(found - s.sample @ s.weights.T)


def test_measured_noise_falls_by_the_predicted_gain(site):
    plain = noise(site)
    balanced = decibels(plain, noise(site, balance=rms_balance(site).astype(np.float32)))
    aligned = decibels(plain, noise(site, align=align_site(site)))
    assert balance_gain(site) > 1.5
    assert alignment_gain(site) > balance_gain(site) + 1
    assert balanced == pytest.approx(balance_gain(site), abs=0.7)
    assert aligned == pytest.approx(alignment_gain(site), abs=0.7)


def test_measured_noise_of_a_model_falls_by_the_predicted_gain():
    """Of the bundled one, in the mean over the layers. docs/rotations.md has the figures."""
    checkpoint = sq.load_checkpoint(sq.bundled_model())
    windows = sq.calibration_windows(checkpoint, sq.QuantConfig(calibration_tokens=1024))
    found = {}
    for layer in sq.calibrate(checkpoint, windows):
        for name, s in layer.sites.items():
            fallen = decibels(noise(s), noise(s, align=align_site(s)))
            found.setdefault(name, []).append((alignment_gain(s), fallen))
    for name, gains in found.items():
        predicted, measured = np.mean(gains, axis=0)
        assert measured == pytest.approx(predicted, abs=0.5), name


def test_gain_of_value_heads_is_of_the_blocks_they_share():
    s = site_statistics(X, [W], shared=(3, 2, 8), reads="attention")
    heads = [g.reshape(3, 2, 8, 8).sum(axis=1) for g in (s.gram, s.weight_gram)]
    m, inverse_t = reference.align_blocks(*heads, DAMPING)
    after = (reference.block_energy(heads[0], m).sum()
             * reference.block_energy(heads[1], inverse_t).sum())
    expected = decibels(energy(X) * energy(W), after)
    assert alignment_gain(s) == pytest.approx(expected, abs=1e-4)
    alone = alignment_gain(replace(s, foldable=False))
    assert alone > expected  # a block for each query head


def test_no_gain_where_there_is_no_block_no_producer_or_no_input(site):
    assert balance_gain(replace(site, foldable=False)) is None
    ones = replace(site, gram=site.sum2.reshape(-1, 1, 1),
                   weight_gram=site.weight_sum2.reshape(-1, 1, 1))
    assert alignment_gain(ones) is None
    silent = site_statistics(np.zeros_like(X), [W])
    assert (balance_gain(silent), alignment_gain(silent)) == (None, None)
