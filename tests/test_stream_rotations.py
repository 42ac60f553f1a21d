"""Methods whose rotations of the residual stream are found from recorded activations."""

import numpy as np
import pytest
from conftest import make_checkpoint

import singlequant as sq
from singlequant import _C
from singlequant.config import QuantConfig
from singlequant.methods.conqur import corner_rotation
from singlequant.methods.kurtail import least_kurtosis
from singlequant.methods.stream import StreamSamples, unit_rows
from singlequant.runtime.model import Model
from singlequant.sweep.prepare import prepare
from singlequant.sweep.samples import stream_samples


def kurtosis(x):
    return np.mean(x**4) / np.mean(x**2) ** 2


def corner_norm(x):
    return np.abs(x).mean()


def outlier_rows(n, rows=600):
    """Rows of equal rms in which two channels are much larger than the others."""
    x = np.random.default_rng(0).standard_normal((rows, n))
    x[:, [1, n // 2]] *= 20
    return unit_rows(x.astype(np.float32))


@pytest.mark.parametrize("n", [2, 7, 24])
def test_sweeps_lower_the_kurtosis_and_updates_raise_the_norm(n):
    x, start = outlier_rows(n), _C.random_orthogonal(n, 1)
    for find in (least_kurtosis, corner_rotation):
        found = find(x, start)
        np.testing.assert_allclose(found.T @ found, np.eye(n), atol=1e-6)
        assert kurtosis(x @ found) < kurtosis(x @ start) < kurtosis(x) or n == 2
        assert corner_norm(x @ found) > corner_norm(x @ start) or n == 2
        np.testing.assert_array_equal(find(x, start), found)


def test_two_channels_get_the_closed_forms():
    """All rows on one axis: both methods turn them onto a diagonal of the square."""
    x = np.array([[np.sqrt(2), 0], [-np.sqrt(2), 0]], np.float32)
    angle = 0.3
    start = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    for find in (least_kurtosis, corner_rotation):
        np.testing.assert_allclose(np.abs(x @ find(x, start)), 1, atol=1e-6)


def test_each_update_raises_the_corner_norm(monkeypatch):
    x, norms = outlier_rows(16), []
    for updates in range(5):
        monkeypatch.setattr("singlequant.methods.conqur.UPDATES", updates)
        norms.append(corner_norm(x @ corner_rotation(x, np.eye(16))))
    assert np.all(np.diff(norms) >= 0)
    assert norms[-1] > norms[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "m"
    return sq.load_checkpoint(make_checkpoint(path, layers=2, dtype="float32"))


@pytest.fixture(scope="module")
def windows(checkpoint):
    return np.random.default_rng(0).integers(0, checkpoint.spec.vocab, (4, 16))


def test_samples_are_the_normed_stream_and_the_value_heads(checkpoint, windows):
    found = stream_samples(checkpoint, windows)
    spec, layers = checkpoint.spec, list(sq.calibrate(checkpoint, windows))
    assert found.residual.shape == (2 * 2 * 64, spec.hidden)
    np.testing.assert_allclose(np.mean(found.residual**2, axis=1), 1, rtol=1e-5)
    norm = checkpoint.layer(0).norms["before_attention"].weight
    np.testing.assert_allclose(found.residual[:64] * norm, layers[0].sites["qkv"].sample,
                               rtol=1e-3, atol=1e-5)  # the norm's eps
    assert len(found.values) == spec.layers
    heads = layers[1].sites["o"].sample.reshape(-1, spec.attention.head_dim)
    np.testing.assert_array_equal(found.values[1], unit_rows(heads))
    assert StreamSamples.rows_wanted(1 << 20) == 32


@pytest.mark.parametrize("method", ["kurtail", "conqur"])
def test_rotated_model_equals_the_original(checkpoint, windows, method):
    view = prepare(checkpoint, QuantConfig(method=method), windows)
    expected = Model(checkpoint).forward(windows[:1])
    found = Model(view).forward(windows[:1])
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    assert view.seconds > 0
    x = stream_samples(checkpoint, windows).residual
    assert kurtosis(x @ view.residual.matrix) < 0.9 * kurtosis(x)


@pytest.mark.parametrize("method", ["cat", "wush", "kurtail", "conqur"])
def test_methods_quantize_from_end_to_end(checkpoint, windows, method, tmp_path, text):
    config = QuantConfig(method=method, scheme="w4a8", weights="rtn", calibration_tokens=64)
    summary = sq.quantize_folder(checkpoint.path, tmp_path / "out", config, text)
    assert {site.site for site in summary.sites} == (
        {"down"} if method in ("kurtail", "conqur") else {"qkv", "o", "gate_up", "down"})
    logits = [sq.load(path).forward(windows[:1]) for path in (checkpoint.path, tmp_path / "out")]
    assert np.corrcoef(logits[0].ravel(), logits[1].ravel())[0, 1] > 0.9
