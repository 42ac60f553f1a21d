"""One folder through the native runtime, transformers and the harness' scores."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("transformers", "4.57", reason="needs transformers 4.57")

import singlequant as sq  # noqa: E402
from benchmarks.routes import agreement, difference, main  # noqa: E402
from singlequant import _C  # noqa: E402

# So many that the standard error of the difference is far below what the test allows.
WINDOWS = {"w4a16": 8, "w4a8": 32, "w4a4": 128}


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w4a4"])
def test_three_routes_agree(scheme, tmp_path, capsys):
    """Native and harness exactly; W4A16 logits within 1e-3, perplexity within 0.1 %: an input that
    lies between two codes may be rounded to either, as sums in another order say."""
    out = tmp_path / "out"
    sq.quantize_folder(sq.bundled_model(), out, sq.QuantConfig(scheme, calibration_tokens=1024))
    row = agreement(out, WINDOWS[scheme], 128)
    assert row["harness"] == 0
    assert row["percent_stderr"] < 0.03  # or the next bound would test the draw of the windows
    assert row["percent"] < 0.1
    assert row["largest_logit"] > 1
    if scheme == "w4a16":
        assert row["logit"] < 1e-3
    main([str(out), "--windows", "2", "--length", "16"])
    assert capsys.readouterr().out.splitlines()[-1].startswith(scheme)


def test_difference_has_the_sign_and_the_error_of_windows():
    windows, expected = np.zeros((4, 11), int), np.array([-20.0, -21, -22, -23])
    nats = np.array([0.1, 0.2, -0.1, 0.2])
    found = difference(list(expected - nats), list(expected), windows)
    assert found["percent"] == pytest.approx(100 * np.expm1(nats.mean() / 10))
    assert found["percent_stderr"] == pytest.approx(100 * nats.std(ddof=1) / 10 / 2)
    assert found["higher"] == 3


def test_noise_moves_w4a4_and_a_fault_shows_by_layer(tmp_path, monkeypatch, capsys):
    from transformers.models.llama import modeling_llama

    out = tmp_path / "out"
    sq.quantize_folder(sq.bundled_model(), out, sq.QuantConfig("w4a4", calibration_tokens=512))
    row = agreement(out, 2, 64, noise=True, layers=True)
    assert 0 < abs(row["noise"]["percent"]) < 1
    assert row["layers"]["median"] < 1e-6 < row["layers"]["largest"]
    main([str(out), "--windows", "2", "--length", "64", "--noise", "--by-layer"])
    said = capsys.readouterr().out
    assert "the native route, last bits moved: " in said
    assert "by layer: median at most" in said
    forward = modeling_llama.LlamaRMSNorm.forward  # a norm that is off by 1e-4
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward",
                        lambda self, x: forward(self, x) * 1.0001)
    assert agreement(out, 2, 64, layers=True)["layers"]["median"] > 1e-5


def test_control_is_the_native_route_on_another_table(tmp_path, capsys):
    out, text = tmp_path / "out", tmp_path / "text"
    text.write_text(sq.bundled_text("calibration")[:4000])
    sq.quantize_folder(sq.bundled_model(), out, sq.QuantConfig("w4a16", calibration_tokens=512))
    active = _C.kernels()["active"]
    row = agreement(out, 2, 32, text.read_text(), "generic")
    assert _C.kernels()["active"] == active
    assert abs(row["control"]["percent"]) < 1e-3
    main([str(out), "--windows", "2", "--length", "32", "--text", str(text), "--control", active])
    assert f"on {active}: +0.00000 % +- 0.00000, higher in 0 of 2" in capsys.readouterr().out
