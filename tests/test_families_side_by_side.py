"""The page that says whether the gains hold beyond LLaMA: it follows from the rows."""

import json

import pytest

from benchmarks import families_side_by_side as script
from singlequant.config import QuantConfig

EVALUATION = {"tokens": 1024, "seq_len": 512, "seconds": 1.0, "predictions": 1020,
              "perplexity": 70.5, "kl_mean": 0.0, "kl_p99": 0.0, "top1_agreement": 1.0}
TRAINING = {"family": "gpt_neox", "parameters": 5_800_000, "cpu_seconds": 330.0, "threads": 1,
            "torch": "2.1", "transformers": "5.1", "texts": ["standard library", "more.txt"],
            "plan": {"seed": 4, "steps": 600, "batch": 2048, "factors": [6.0]},
            "peaks": {"q, k, v": [9.0, 14.0], "o": [2.0, 3.0]}}


def made_row(config, default, *divergences):
    results = [EVALUATION | {"kl_mean": kl} for kl in divergences]
    return {"config": config and config.to_json(), "default": default, "results": results}


def made_side(model, architecture, kl, training=None):
    """A comparison with these divergences, method -> one per text."""
    rows = [made_row(None, False, 0.0, 0.0)]
    for method, values in kl.items():
        default = method == script.DEFAULT
        config = QuantConfig(scheme="w4a4") if default else QuantConfig(
            scheme="w4a4", method=method, weights="rtn", clip=1.0)
        rows.append(made_row(config, default, *values))
    values = {"model": model, "fingerprint": "f", "texts": ["heldout", "other"], "seq_len": 512,
              "calibration": "bundled", "machine": {"cpu": "Made Up 9000", "date": "2025-01-02"},
              "rows": rows}
    return script.Side(architecture, training, values)


@pytest.fixture
def sides():
    good = {"none": (1.0, 2.0), "hadamard": (0.5, 1.0), "singlequant": (0.25, 0.8),
            "balanced": (0.125, 0.5), script.DEFAULT: (0.0625, 0.25)}
    return [made_side("llama-a", "LlamaForCausalLM", good),
            made_side("neox-a", "GPTNeoXForCausalLM", {**good, "singlequant": (0.25, 1.25)},
                      TRAINING)]


def test_gains_are_ratios_by_case(sides):
    found = {(g.architecture, g.ours, g.other): g for g in script.gains(sides)}
    gain = found["GPTNeoXForCausalLM", "singlequant", "hadamard"]
    assert gain.ratios == {("neox-a", "heldout"): 0.5, ("neox-a", "other"): 1.25}
    assert gain.held == 1
    assert gain.mean == pytest.approx(0.625**0.5)
    assert len(found) == 2 * len(script.GAINS)


def test_page_says_where_a_gain_is_missing(sides):
    page = script.page(sides)
    assert "| w4a4 | LlamaForCausalLM | 1.414 | 0.7071 | 0.4472 | 0.2500 | 0.1250 |" in page
    assert "| w4a4 | singlequant | hadamard | 0.63 (2 of 2) | 0.79 (1 of 2) |" in page
    assert "Of 20 comparisons, 1 has no gain." in page
    assert ("- GPTNeoXForCausalLM, w4a4: `singlequant` is not closer than `hadamard` in 1 of 2 "
            "cases. The ratio of KL is 0.791 on average and 1.250 at worst (neox-a on other)."
            ) in page
    assert "LlamaForCausalLM, w4a4: `singlequant` is not" not in page
    assert "- LlamaForCausalLM, w4a4: 5 of 5 gains hold in every case." in page
    assert ("- GPTNeoXForCausalLM, w4a4: 4 of 5 gains hold in every case, but not that of "
            "`singlequant` over `hadamard`.") in page


def test_page_says_which_network_has_no_made_outliers(sides, monkeypatch):
    monkeypatch.setitem(TRAINING["plan"], "factors", [])
    assert "--seed 4 --steps 600 --threads 1 --plain --text more.txt" in script.page(sides)


def test_page_names_commands_and_training(sides):
    page = script.page(sides)
    assert ("python -m benchmarks.train_families OUT --family gpt_neox --seed 4 --steps 600 "
            "--threads 1 --text more.txt") in page
    assert "--plain" not in page
    assert "5.8M" in page
    assert "9 to 14" in page
    assert "`singlequant compare neox-a --methods none,hadamard,singlequant,balanced" in page
    assert "Made Up 9000" in page


def test_page_says_what_the_recipe_was_when_it_is_another_today(sides):
    assert "is what `singlequant quantize` does: `balanced`" in script.page(sides)
    config = sides[0].values["rows"][-1]["config"]
    config |= {"clip": 0.8, "calibration_tokens": 2048}
    del config["calibration_bits"]
    assert ("is what `singlequant quantize` did when these figures were measured: `balanced`, with "
            "GPTQ, and with clipped activations in W4A4. Some of its settings were others than "
            "today's: `clip` was 0.8 in W4A4 and is 0.75, `calibration_tokens` was 2048 and is "
            "8192, there was no `calibration_bits`.") in script.page(sides)


def test_failed_row_is_shown_and_not_counted(sides):
    row = sides[1].values["rows"][2]
    row |= {"error": "ValueError: no factors", "results": []}
    assert "- w4a4 hadamard: ValueError: no factors" in script.page(sides)
    assert not [g for g in script.gains(sides) if g.architecture.startswith("GPTNeoX")
                and "hadamard" in (g.ours, g.other)]


def test_comparison_of_a_folder_becomes_a_page(model, text, tmp_path, capsys):
    page = tmp_path / "page.md"
    options = ["--out", str(tmp_path / "out"), "--windows", "1", "--seq-len", "64"]
    script.main([str(model), *options, "--text", str(text)])
    script.main([*options, "--page", str(page)])
    assert "### model, LlamaForCausalLM" in page.read_text()
    rows = json.loads((tmp_path / "out" / "model.json").read_text())["values"]["rows"]
    assert {row["config"]["clip"] for row in rows if row["default"]} == {0.75, 1.0}
    assert "KL, text" in page.read_text()
    assert "written" in capsys.readouterr().out


def test_foreign_file_and_empty_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected files of families_side_by_side, found none"):
        script.read_sides(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="x.json: expected a file of families_side_by_side"):
        script.read_sides(tmp_path)
