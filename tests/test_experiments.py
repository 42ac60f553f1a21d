"""Each experiment is a command: a table in three forms and a figure, resumable, honest refusals."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import singlequant as sq
from benchmarks.experiments import command, report, sensitivity
from singlequant.methods.axes import Site
from singlequant.sweep import calibrate as calibrate_stage

ROOT = Path(__file__).resolve().parents[1]


def run(script, *arguments, expect=0):
    """The finished process of a command; warnings are errors in it too."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"benchmarks.experiments.{script}",
         *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=900, cwd=ROOT,
    )
    assert done.returncode == expect, done.stderr
    return done


def read(out, name):
    """Rows of the JSON, after a check that all forms hold them and that the machine is named."""
    whole = json.loads((out / f"{name}.json").read_text())
    rows = whole["rows"]
    assert whole["environment"]["cpu"]
    assert whole["environment"]["kernels"]["active"]
    table = list(csv.DictReader((out / f"{name}.csv").read_text().splitlines()))
    assert len(table) == len(rows) > 0
    for cells, row in zip(table, rows, strict=True):
        for key, value in row.items():
            assert cells[key] == ("" if value is None else str(value))
    markdown = (out / f"{name}.md").read_text()
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    assert whole["environment"]["cpu"] in markdown
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.tmp"))
    return rows


@pytest.fixture
def site():
    """Statistics of one site with two large channels."""
    x = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    x[:, [3, 40]] *= 20
    weights = [np.random.default_rng(1).standard_normal((32, 96)).astype(np.float32)]
    return calibrate_stage.site_statistics(x, weights)


# ---- the commands -------------------------------------------------------------------------------


def test_ablation_writes_what_compare_finds(tmp_path):
    run("ablation", "--quick", "--out", tmp_path)
    rows = {row["method"]: row for row in read(tmp_path, "ablation")}
    methods = ["none", "art", "urt", "paper", "hadamard", "singlequant"]
    assert list(rows) == ["original", *methods]
    found = sq.compare(sq.bundled_model(), methods=["urt"], schemes=["w4a4"], seq_len=128,
                       windows=2, calibration_tokens=256, defaults=False)
    assert rows["original"]["perplexity"] == found.rows[0].results[0].perplexity
    assert rows["urt"]["kl_mean"] == found.rows[1].results[0].kl_mean
    assert rows["hadamard"]["kl_to_hadamard"] == 1
    assert rows["none"]["kl_mean"] > 2 * rows["paper"]["kl_mean"]


def test_second_run_of_a_command_computes_nothing(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(sq.bundled_text("heldout")[:3000])
    arguments = ("--quick", "--text", text, "--text", ROOT / "CONTRIBUTING.md", "--seeds", "0,3",
                 "--windows", "1", "--out", tmp_path)
    run("ablation", *arguments)
    first, lines = read(tmp_path, "ablation"), (tmp_path / "rows.jsonl").read_bytes()
    assert len(lines.splitlines()) == 1 + 2 * 6
    assert {row["text"] for row in first} == {"text", "CONTRIBUTING"}
    assert all(row["seeds"] == 2 for row in first if row["method"] != "original")
    assert {row["kl_mean_sd"] for row in first if row["method"] == "hadamard"} == {0}
    run("ablation", *arguments)
    assert read(tmp_path, "ablation") == first
    assert (tmp_path / "rows.jsonl").read_bytes() == lines


def test_thresholds_move_the_paper_method_and_are_resumable(tmp_path):
    arguments = ("--part", "thresholds", "--quick", "--out", tmp_path)
    done = run("sensitivity", *arguments)
    rows = read(tmp_path, "thresholds")
    default = {row["kl_mean"] for row in rows if row["default"]}
    moved = {row["kl_mean"] for row in rows if row["value"] is not None and not row["default"]}
    assert len(default) == 1
    assert len(moved) == 4  # each threshold has an effect
    assert not default & moved
    paper = sq.compare(sq.bundled_model(), methods=["paper"], schemes=["w4a4"], seq_len=128,
                       windows=2, calibration_tokens=256, defaults=False)
    assert default == {paper.rows[1].results[0].kl_mean}
    if importlib.util.find_spec("lm_eval"):
        assert all(0 <= row["stdlib_continuation_acc"] <= 1 for row in rows)
    else:
        assert "not run, lm_eval is not installed" in done.stdout
    lines = (tmp_path / "rows.jsonl").read_bytes()
    run("sensitivity", *arguments)
    assert (tmp_path / "rows.jsonl").read_bytes() == lines
    assert read(tmp_path, "thresholds") == rows


@pytest.mark.slow
def test_factors_of_other_sizes_give_another_rotation(tmp_path):
    run("sensitivity", "--part", "factors", "--quick", "--out", tmp_path)
    rows = read(tmp_path, "factors")
    assert [row["default"] for row in rows].count(True) == 1
    for row in rows:
        for name, k in (("qkv", 192), ("o", 192), ("gate_up", 192), ("down", 448)):
            k1, k2 = map(int, row[name].split("x"))
            assert k1 * k2 == k
        assert row["solve_seconds"] > 0
    assert len({row["kl_mean"] for row in rows}) == len({row["qkv"] for row in rows}) == len(rows)
    default, = (row for row in rows if row["default"])
    whole = sq.compare(sq.bundled_model(), methods=["singlequant", "hadamard"],
                       schemes=["w4a4"], weights=["mse"], clip=None, seq_len=128, windows=2,
                       calibration_tokens=256, defaults=False)
    found = [row.results[0].kl_mean for row in whole.rows[1:]]
    assert [default["kl_mean"], default["hadamard_kl"]] == found  # the method's own factors


@pytest.mark.slow
@pytest.mark.parametrize("part", ["tokens", "seeds", "domain"])
def test_sensitivity_part_writes_its_outputs(part, tmp_path):
    done = run("sensitivity", "--part", part, "--quick", "--out", tmp_path)
    rows = read(tmp_path, part)
    if part == "tokens":
        assert [row["calibration_tokens"] for row in rows] == [16, 256, 4096]
        assert rows[-1]["to_most"] == 1
        fits = [r["calibration_tokens"] for r in rows if r["to_most"] <= 1.02]
        assert f"**{fits[0]}**" in done.stdout
    elif part == "seeds":
        assert all(0 < row["least"] <= row["kl_mean"] <= row["most"] for row in rows)
        assert all(row["kl_mean_sd"] > 0 for row in rows)
    else:
        plain = [row for row in rows if row["recipe"] == "hadamard"]
        assert all(row["to_own"] == 1 for row in plain)  # takes nothing from the calibration
        assert {row["evaluated_on"] for row in rows} == {"heldout", "c-sources"}
        assert len({row["kl_mean"] for row in rows if row["recipe"] == "default"}) == 4


@pytest.mark.slow
def test_signatures_measure_any_model_and_say_what_they_cannot(tmp_path, make_checkpoint):
    model = make_checkpoint(tmp_path / "random")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    texts = tmp_path / "a.txt", tmp_path / "b.txt"
    for file, part in zip(texts, ("calibration", "heldout"), strict=True):
        file.write_text(sq.bundled_text(part)[:20000])
    done = run("signatures", model, broken, "--quick", "--domain", texts[0], "--domain",
               *texts, "--out", tmp_path / "out")
    rows = read(tmp_path / "out", "signatures")
    quantized = [row for row in rows if row["model"] == "random"]
    assert {row["text"] for row in quantized} == {"a", "b"}
    for row in quantized:
        if row["recipe"] == "hadamard":
            assert row["kl_ratio"] == 1
    failed = [row for row in rows if row["model"] == "broken"]
    assert len(failed) == 1
    assert "config.json" in failed[0]["error"]
    for name in ("singlequant", "default"):
        worse = [r for r in quantized if r["recipe"] == name and r["kl_ratio"] > 1]
        assert f"{name} loses to hadamard in {len(worse)} of 2 cases" in done.stdout
    whole, refused = read(tmp_path / "out", "memory")
    assert "error" in refused
    assert whole["bytes_on_disk"] == sum(f.stat().st_size for f in model.iterdir())
    for stage in ("read", "calibrate", "solve", "quantize", "evaluate"):
        assert whole[f"{stage}_share"] == whole[f"{stage}_bytes"] / whole["bytes_on_disk"] > 0


@pytest.mark.parametrize(("arguments", "message"), [
    (("ablation", "no-such-model"), "no-such-model"),
    (("ablation", "--text", "no-such-text"), "no-such-text"),
    (("ablation", "--scheme", "w3a3"), "scheme: expected one of"),
    (("sensitivity", "--part", "domain", "--domain", "a", "b", "c"), "expected one or two"),
])
def test_bad_input_is_one_line_that_names_it(arguments, message, tmp_path):
    script, *options = arguments
    done = run(script, *options, "--quick", "--out", tmp_path, expect=1)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.md"))


# ---- their parts --------------------------------------------------------------------------------


def test_urt_threshold_leaves_the_indices_below_it_alone(site):
    build = Site(site)
    v = build.signed_extremes(0)
    median = np.median(np.abs(v))
    below = np.abs(v) < 1.5 * median
    assert 0 < below.sum() < len(v) - 1
    build.urt_flat(0, 1.5)
    assert not np.isin(build.axes[0].factor().pairs, np.flatnonzero(below)).any()
    matrix = build.axes[0].factor().matrix()
    rotated = np.abs(matrix @ v)[~below]
    np.testing.assert_allclose(rotated, np.linalg.norm(v[~below]) / (~below).sum() ** 0.5)
    np.testing.assert_array_equal((matrix @ v)[below], v[below])


def test_urt_threshold_above_all_extremes_does_nothing(site):
    build = Site(site)
    build.urt_flat(0, 1e9)
    assert build.axes[0].factor().is_identity
    assert build.steps == []


def test_resized_sites_keep_everything_but_the_axes(site):
    for scale in sensitivity.FACTOR_SCALES:
        new = sensitivity.resized(site, scale)
        assert new.k1 * new.k2 == 96
        assert new.sample is site.sample
    assert sensitivity.resized(site, sensitivity.Fraction(1)) is site


def test_halves_of_a_text_do_not_overlap(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {i}\n" for i in range(11)))
    with command.domains([[file]]) as (domain,):
        calibration, text = domain.calibration.read_text(), domain.text.read_text()
    assert domain.name == "text"
    assert calibration + text == file.read_text()
    assert calibration.endswith("line 4\n")
    assert file.read_text().count("\n") == 11  # unchanged


def test_spread_is_the_sample_standard_deviation():
    row = {}
    report.add_spread(row, [1.0, 2.0, 6.0], "x")
    assert row == {"x": 3.0, "x_sd": pytest.approx(np.std([1, 2, 6], ddof=1))}
    report.add_spread(row, [4.0], "y")
    assert (row["y"], row["y_sd"]) == (4.0, None)
