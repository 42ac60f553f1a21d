"""benchmarks/defaults: its rows are those of the recipe, its errors name the change."""

import json

import pytest

import singlequant as sq
from benchmarks import defaults as script

SEQ_LEN, WINDOWS = 32, 3


def arguments(model, text, *more):
    return [str(model), "--text", str(text), "--seq-len", str(SEQ_LEN), "--windows", str(WINDOWS),
            "--calibration", str(text), *more]


def test_rows_are_the_recipe_and_its_changes(model, text, tmp_path, capsys):
    change = "bits=4 weights=rtn calibration_tokens=64"
    script.main(arguments(model, text, "--change", change, "--seeds", "0,1", "--out",
                          str(tmp_path / "out")))
    (file,) = (tmp_path / "out").glob("*.json")
    first, second = json.loads(file.read_text())["rows"]
    assert [first["change"], second["change"]] == ["none", change]
    kl = []
    for seed in (0, 1):
        out = tmp_path / f"packed{seed}"
        config = sq.QuantConfig(weights="rtn", bits=4, calibration_tokens=64, seed=seed)
        sq.quantize_folder(model, out, config, text)
        tokens = sq.load(model).encode(text.read_text())[: SEQ_LEN * WINDOWS]
        kl.append(sq.perplexity(sq.load(out), tokens, SEQ_LEN, sq.load(model)).kl_mean)
    assert second[f"{text.stem} KL"] == pytest.approx(sum(kl) / 2)
    assert second[f"{text.stem} KL_sd"] == pytest.approx(abs(kl[0] - kl[1]) / 2**0.5)
    assert first[f"{text.stem} KL"] < second[f"{text.stem} KL"]  # more bits and gptq
    assert "Changes of the default recipe" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "message"), [
    ("bits", "expected KEY=VALUE, found 'bits'"),
    ("bites=4", "unknown key 'bites'"),
    ("bits=3", "bits: expected a number from 4 to 8, found 3"),
])
def test_changes_that_are_none_are_refused(model, text, capsys, change, message):
    with pytest.raises(SystemExit) as end:
        script.main(arguments(model, text, "--change", change))
    assert message in f"{end.value}{capsys.readouterr().err}"


def test_gptq_calibrates_on_more_tokens_than_other_rounding():
    assert sq.QuantConfig().calibration_tokens == 8192
    assert sq.QuantConfig(weights="mse").calibration_tokens == 2048
    assert sq.QuantConfig(weights="mse", calibration_tokens=512).calibration_tokens == 512
    rows = sq.CompareOptions(methods=("none",), weights=("mse",)).recipes()
    assert {config.calibration_tokens for config, _ in rows} == {8192}
    rows = sq.CompareOptions(methods=("none",), weights=("mse",), defaults=False).recipes()
    assert {config.calibration_tokens for config, _ in rows} == {2048}
