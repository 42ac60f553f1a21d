"""Block-wise training of weights and scales: what it lowers, and what rounding keeps of it."""

import numpy as np
import pytest
from conftest import make_checkpoint

torch = pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("transformers", reason="needs the torch extra")

import singlequant as sq  # noqa: E402
from singlequant import _C  # noqa: E402
from singlequant.checkpoint.trained import TrainedCheckpoint  # noqa: E402
from singlequant.config import QuantConfig  # noqa: E402
from singlequant.methods import efficientqat  # noqa: E402
from singlequant.methods.efficientqat import train_blocks  # noqa: E402
from singlequant.runtime.model import Model  # noqa: E402
from singlequant.sweep.layer import quantize_linear  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "m"
    return sq.load_checkpoint(make_checkpoint(path, layers=2, dtype="float32"))


@pytest.fixture(scope="module")
def windows(checkpoint):
    return np.random.default_rng(0).integers(0, checkpoint.spec.vocab, (4, 16))


@pytest.mark.parametrize("group", [0, 32])
def test_training_improves_over_its_start_and_rounding_keeps_it(checkpoint, windows, group):
    trained = train_blocks(checkpoint, windows, group, steps=12)
    assert (trained.errors[:, 1] < 0.9 * trained.errors[:, 0]).all()
    config = QuantConfig("w4a4", "none", "rtn", 4, group_size=group)
    for layer in range(2):
        for linear in checkpoint.layer(layer).linears.values():
            found = trained.weights[linear.name]
            assert found.shape == linear.weight.shape
            packed = quantize_linear(found, None, config, linear.name)
            codes = _C.unpack(packed.words, found.shape[1])
            again = _C.dequantize(codes, packed.scales)
            np.testing.assert_allclose(again, found, rtol=1e-5, atol=1e-7)
            assert np.abs(codes).reshape(len(found), packed.scales.shape[1], -1).max(-1).min() == 7


def test_no_step_is_rounding_to_nearest(checkpoint, windows):
    """The start: original inputs of the first layer, and rounded weights on torch's side."""
    trained = train_blocks(checkpoint, windows, steps=0)
    np.testing.assert_array_equal(trained.errors[:, 0], trained.errors[:, 1])
    for linear in checkpoint.layer(0).linears.values():
        codes, scales, _ = _C.quantize(_C.to_float32(linear.weight), 4)
        np.testing.assert_allclose(trained.weights[linear.name], _C.dequantize(codes, scales),
                                   rtol=1e-5, atol=1e-7)
    # the torch layers are the runtime's: the last layer's error is that of the packed weights
    hidden = [Model(c).hidden_states(windows) for c in (
        checkpoint, TrainedCheckpoint(checkpoint, trained.weights))]
    assert 0.01 < np.linalg.norm(hidden[1] - hidden[0]) / np.linalg.norm(hidden[0]) < 0.5


def test_method_quantizes_from_end_to_end(checkpoint, tmp_path, text, monkeypatch):
    monkeypatch.setattr(efficientqat.train_blocks, "__defaults__", (0, 3, 0, None))
    outs = {}
    for method in ("none", "efficientqat"):
        config = QuantConfig("w4a16", method, "rtn", 4, calibration_tokens=128)
        sq.quantize_folder(checkpoint.path, tmp_path / method, config, text)
        outs[method] = sq.load_checkpoint(tmp_path / method)
    a, b = (outs[m].layer(0).linears["up"].weight.words for m in outs)
    assert not np.array_equal(a, b)


def test_trained_checkpoint_names_what_it_refuses(checkpoint):
    name = checkpoint.linear_name(0, "q")
    with pytest.raises(ValueError, match=rf"{name}: expected float32 \(64, 64\), found float64"):
        TrainedCheckpoint(checkpoint, {name: np.zeros((64, 64))})
    with pytest.raises(ValueError, match="group_size: expected a divisor"):
        train_blocks(checkpoint, np.zeros((1, 4), np.int64), 48)
    with pytest.raises(ValueError, match="windows: expected"):
        train_blocks(checkpoint, np.zeros(4, np.int64))
