"""One folder through the native runtime, transformers and the harness' scores."""

import pytest

pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("transformers", "4.57", reason="needs transformers 4.57")

import singlequant as sq  # noqa: E402
from benchmarks.routes import agreement, main  # noqa: E402


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w4a4"])
def test_three_routes_agree(scheme, tmp_path, capsys):
    """Native and harness exactly; W4A16 logits within 1e-3, perplexity within 0.1 %: an input that
    lies between two codes may be rounded to either, as sums in another order say."""
    out = tmp_path / "out"
    sq.quantize_folder(sq.bundled_model(), out, sq.QuantConfig(scheme, calibration_tokens=1024))
    row = agreement(out, 8, 128)
    assert row["harness"] == 0
    assert row["percent"] < 0.1
    assert row["largest_logit"] > 1
    if scheme == "w4a16":
        assert row["logit"] < 1e-3
    main([str(out), "--windows", "2", "--length", "16"])
    assert capsys.readouterr().out.splitlines()[-1].startswith(scheme)
