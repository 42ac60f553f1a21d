# SPDX-License-Identifier: Apache-2.0
"""The convergence and latency experiments, and the page of results made from them."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import singlequant as sq
from benchmarks.experiments import command, convergence, latency, results
from singlequant.methods import spinquant

ROOT = Path(__file__).resolve().parents[1]

TOKENS, WINDOWS, SEQ_LEN = 256, 3, 64


def common_options(model, text, out):
    return [str(model), "--out", str(out), "--text", str(text), "--calibration", str(text),
            "--calibration-tokens", str(TOKENS), "--windows", str(WINDOWS), "--seq-len",
            str(SEQ_LEN), "--repeats", "1"]


def calibration_windows(model, text):
    checkpoint = sq.load_checkpoint(model)
    config = sq.QuantConfig(calibration_tokens=TOKENS)
    return checkpoint, sq.calibration_windows(checkpoint, config, text)


def a_run(model, text, steps=2, of=4, **settings):
    """A run's state that still has the rotations it began with."""
    checkpoint, windows = calibration_windows(model, text)
    settings = {
        "source_sha256": checkpoint.fingerprint,
        "windows_sha256": hashlib.sha256(np.ascontiguousarray(windows, np.int64)).hexdigest(),
        "windows": list(windows.shape), "steps": of, "learning_rate": 1.5, "batch": 1, "seed": 0,
        "weight_bits": 4, "activation_bits": 4, "clip": 1.0, "noise": True, **settings,
    }
    losses = np.linspace(5, 4, steps)
    return spinquant.Learned(
        *spinquant.starting_rotations(checkpoint.spec, settings["seed"]), losses, losses,
        np.full(steps, 3.0), np.full(steps, 2.0), np.zeros(1, np.int64), np.full((1, 5), 5.0),
        settings,
    )


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


# ---- convergence --------------------------------------------------------------------------------


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.mark.usefixtures("without_torch")
def test_an_unfinished_run_is_taken_as_it_is_without_torch(model, text, tmp_path, capsys):
    file = tmp_path / "run.safetensors"
    spinquant.save_learned(a_run(model, text), file)
    options = [*common_options(model, text, tmp_path / "out"), "--learned", str(file)]
    convergence.main([*options, "--time-limit", "0"])
    assert "has 2 of its 4 steps" in capsys.readouterr().out
    values = read(tmp_path / "out", "convergence")
    rows = {row["method"]: row for row in values["rows"]}
    assert list(rows)[:3] == ["original", "spinquant, 0 steps", "spinquant, 2 steps"]
    assert {"hadamard", "duquant", "singlequant"} <= set(rows)
    start, now, ours = (rows[k] for k in ("spinquant, 0 steps", "spinquant, 2 steps",
                                          "singlequant"))
    assert now["kl_mean"] == start["kl_mean"] > 0  # the state holds the rotations of the start
    assert now["cpu_seconds"] == pytest.approx(4 * 2.0)
    assert now["wall_seconds"] == pytest.approx(4 * 3.0)
    assert ours["spinquant_cpu_ratio"] == pytest.approx(8.0 / ours["cpu_seconds"])
    assert ours["cpu_seconds_without_calibration"] > 0
    assert ours["cpu_seconds_with_gptq"] > 0
    assert values["curves"]["losses"] == [5.0, 4.0]
    assert rows["original"]["kl_mean"] == pytest.approx(0, abs=1e-9)
    for method in ("hadamard", "duquant", "singlequant"):
        assert (rows[method]["weights"], rows[method]["clip"]) == ("rtn", 1.0)


@pytest.mark.usefixtures("without_torch")
def test_a_run_that_must_go_on_needs_torch(model, text, tmp_path):
    file = tmp_path / "run.safetensors"
    spinquant.save_learned(a_run(model, text), file)
    options = common_options(model, text, tmp_path / "out")
    with pytest.raises(SystemExit, match="2 steps of SpinQuant needs torch"):
        convergence.main([*options, "--learned", str(file)])
    with pytest.raises(SystemExit, match=r"a new run.*singlequant\[torch\].*--learned"):
        convergence.main(options)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"source_sha256": "0"}, "source_sha256: expected"),
     ({"windows_sha256": "0"}, "windows_sha256: expected"),
     ({"activation_bits": 8}, "activation_bits: expected 4.*found 8")],
)
def test_a_run_of_something_else_is_refused(model, text, tmp_path, change, message):
    file = tmp_path / "run.safetensors"
    spinquant.save_learned(a_run(model, text, **change), file)
    with pytest.raises(SystemExit, match=message):
        convergence.main([*common_options(model, text, tmp_path / "out"), "--learned", str(file)])


def test_calibration_loss_is_the_cross_entropy_of_the_windows(model, text, tmp_path):
    checkpoint, windows = calibration_windows(model, text)
    arguments = command.parse(convergence.parser(), common_options(model, text, tmp_path))
    bench = convergence.Bench(checkpoint, windows, text.read_text(), arguments, tmp_path)
    logits = sq.load(model).forward(windows)[:, :-1].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(log_p, windows[:, 1:, None], axis=-1)
    found = bench.judge(sq.load(model))
    assert found["calibration_loss"] == pytest.approx(-chosen.mean(), rel=1e-5)
    assert len(bench.laboratory.tokens) == WINDOWS * SEQ_LEN


@pytest.mark.parametrize(("windows", "batch", "cycle"),
                         [(4, 1, 4), (4, 2, 2), (3, 2, 3), (1, 1, 1)])
def test_cycle_means_meet_every_window_equally_often(windows, batch, cycle):
    """Losses that depend on the windows alone have equal means."""
    own = np.arange(windows, dtype=float) ** 2
    chosen = (np.arange(20)[:, None] * batch + np.arange(batch)) % windows
    steps, means = convergence.cycle_means(own[chosen].mean(axis=1), windows, batch)
    np.testing.assert_allclose(means, own.mean())
    assert len(steps) == len(means) == 20 - cycle + 1
    assert steps[0] == (cycle - 1) / 2


def test_cycle_means_of_a_run_shorter_than_a_cycle_are_empty():
    steps, means = convergence.cycle_means(np.ones(2), 4, 1)
    assert len(steps) == len(means) == 0


def test_learned_rotations_are_worth_in_the_runtime_what_torch_says(text, tmp_path):
    """On the bundled model; the run is kept, and a later call takes it."""
    pytest.importorskip("torch", reason="needs the torch extra")
    options = common_options(sq.bundled_model(), text, tmp_path / "out")
    convergence.main([*options, "--steps", "3"])
    values = read(tmp_path / "out", "convergence")
    rows = {row["method"]: row for row in values["rows"]}
    kept = spinquant.load_learned(tmp_path / "out" / "learned.safetensors")
    assert kept.finished
    assert len(values["curves"]["losses"]) == 3
    assert rows["spinquant, 3 steps"]["cpu_seconds"] == pytest.approx(kept.cpu_seconds.sum())
    for name, probe in (("spinquant, 0 steps", 0), ("spinquant, 3 steps", -1)):
        found = rows[name]["calibration_loss"]
        assert found == pytest.approx(kept.probe_losses[probe, 0], abs=0.02)
    again = taken(sq.bundled_model(), text, options)  # 1000 steps are the default of a new run
    np.testing.assert_array_equal(again.R1, kept.R1)


def taken(model, text, options):
    arguments = command.parse(convergence.parser(), options)
    return convergence.learned_rotations(*calibration_windows(model, text), arguments)


def test_an_unfinished_run_goes_on_where_it_ended(model, text, tmp_path):
    pytest.importorskip("torch", reason="needs the torch extra")
    file, out = tmp_path / "run.safetensors", tmp_path / "out"
    spinquant.save_learned(a_run(model, text, steps=2, of=5), file)
    before = file.read_bytes()
    run = taken(model, text, [*common_options(model, text, out), "--learned", str(file)])
    assert (run.steps, run.settings["steps"]) == (5, 5)
    assert run.losses[:2].tolist() == [5.0, 4.0]
    assert file.read_bytes() == before
    assert spinquant.load_learned(out / "learned.safetensors").steps == 5


def test_a_run_without_a_step_is_refused(model, text, tmp_path):
    file = tmp_path / "run.safetensors"
    spinquant.save_learned(a_run(model, text, steps=0), file)
    with pytest.raises(SystemExit, match="--time-limit: expected time for a step"):
        convergence.main([*common_options(model, text, tmp_path / "out"), "--learned", str(file),
                          "--time-limit", "0"])


# ---- latency ------------------------------------------------------------------------------------


def test_latency_times_every_model_and_phase(model, tmp_path):
    latency.main([str(model), "--out", str(tmp_path / "out"), "--prefill", "32", "--batches", "1,3",
                  "--context", "8", "--decode", "2", "--repeats", "3", "--schemes", "w4a4,w4a16",
                  "--methods", "none,singlequant", "--threads", "1"])
    rows = read(tmp_path / "out", "latency")["rows"]
    assert [(r["scheme"], r["method"]) for r in rows] == [
        ("16-bit", "original"), ("w4a4", "none"), ("w4a4", "singlequant"), ("w4a16", "none"),
        ("w4a16", "singlequant"),
    ]
    for phase, tokens in (("prefill", 32), ("decode_1", 2), ("decode_3", 6)):
        base = rows[0][f"{phase}_tokens_per_second"]
        assert rows[0][f"{phase}_transform_share"] is None
        for row in rows:
            seconds = row[f"{phase}_seconds"]
            assert seconds["repeats"] == 3
            assert row[f"{phase}_tokens_per_second"] == pytest.approx(tokens / seconds["median"])
            assert row[f"{phase}_ratio"] == pytest.approx(
                row[f"{phase}_tokens_per_second"] / base)
        assert all(row[f"{phase}_transform_share"] > 0 for row in rows[1:])
    assert all(row["peak_memory_MB"] > 0 for row in rows)
    assert rows[1]["disk_MB"] < rows[0]["disk_MB"]
    assert sq.get_num_threads() >= 1


def test_decoder_decodes_what_generate_writes(model):
    """Each call goes on where the last one ended."""
    loaded = sq.load(model)
    prompt = np.arange(2, 12)
    decoder = latency.Decoder(loaded, np.stack([prompt, prompt[::-1]]), steps=3, calls=2)
    decoder()
    decoder()
    expected = [loaded.generate(p.tolist(), max_new_tokens=7, stop_tokens=[])
                for p in (prompt, prompt[::-1])]
    assert decoder.session.lengths.tolist() == [16, 16]
    assert loaded.logits(decoder.last).argmax(axis=1).tolist() == [ids[6] for ids in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--prefill", "257"], "--prefill: expected at most 256"),
     (["--context", "255"], "expected at most 256 tokens"),
     (["--repeats", "0"], "--repeats: expected at least 1"),
     (["--decode", "0"], "--decode: expected at least 1")],
)
def test_latency_refuses_what_the_model_cannot_hold(model, tmp_path, options, message):
    small = ["--prefill", "8", "--context", "8", "--repeats", "1", "--decode", "1"]
    with pytest.raises(SystemExit, match=message):
        latency.main([str(model), "--out", str(tmp_path / "out"), *small, *options])


# ---- the page -----------------------------------------------------------------------------------

ENVIRONMENT = {"cpu": "Some CPU", "cpus": 2, "threads": 1, "date": "2026-01-02",
               "load": [0.1, 0.1, 0.1], "kernels": {"active": "generic"}, "commit": "abc"}


def experiment(rows, **more):
    return {"title": "A title", "command": "python x.py /some/where/model ../there/t.txt --n 1",
            "environment": ENVIRONMENT, "rows": rows, "notes": ["a note"], "figure": None, **more}


def write_json(folder, name, values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(values))


CONVERGENCE = [
    {"method": "original", "kl_mean": 0.0},
    {"method": "spinquant, 5 steps", "weights": "rtn", "clip": 1.0, "kl_mean": 0.02,
     "cpu_seconds": 90.0},
    {"method": "hadamard", "weights": "rtn", "clip": 1.0, "kl_mean": 0.05, "cpu_seconds": 1.0},
    {"method": "singlequant", "weights": "rtn", "clip": 1.0, "kl_mean": 0.04, "cpu_seconds": 2.0,
     "spinquant_cpu_ratio": 45.0},
    {"method": "default (balanced)", "weights": "mse", "clip": 0.8, "kl_mean": 0.01,
     "cpu_seconds": 3.0},
]


def test_the_page_has_each_table_with_its_command_machine_and_figure(model, text, tmp_path):
    folder, page = tmp_path / "in", tmp_path / "docs" / "results.md"
    write_json(folder / "sub", "convergence", experiment(CONVERGENCE, figure="convergence.png",
                                                         model="m"))
    (folder / "sub" / "convergence.png").write_bytes(b"picture")
    write_json(folder, "tokens", experiment([{"tokens": 16, "kl_mean": 0.75}],
                                            options={"model": "/x/m"}))
    write_json(folder, "ablation", experiment([{"text": "t", "method": "none", "kl_mean": 0.5},
                                               {"text": "t", "method": "singlequant",
                                                "kl_mean": 0.125}]))
    found = sq.compare(model, methods=["none", "singlequant"], schemes=["w4a4"], texts=[text],
                       seq_len=64, windows=2, calibration=text, calibration_tokens=128)
    found.to_json(folder / "any-name.json")
    results.main(["--from", str(folder), "--out", str(page)])
    written = page.read_text()
    order = [written.index(f"## {results.SECTIONS[kind][0]}")
             for kind in ("compare", "convergence", "ablation", "sensitivity")]
    assert order == sorted(order)
    assert order[-1] < written.index("## Where SingleQuant loses")
    assert "`python x.py model t.txt --n 1`" in written
    assert "singlequant compare model --methods none,singlequant --schemes w4a4" in written
    assert str(tmp_path) not in written
    assert "Some CPU, 2 CPUs, 1 thread, generic kernels" in written
    assert "2026-01-02" in written
    assert "| t | singlequant | 0.1250 |" in written
    assert "| 16 | 0.7500 |" in written
    assert (page.parent / "images" / "convergence-m.png").read_bytes() == b"picture"
    assert "(images/convergence-m.png)" in written
    for row in found.rows[1:]:
        assert f"{row.results[0].kl_mean:.5f}" in written


def test_losses_are_of_equal_rounding_and_the_default_meets_all():
    rows = [dict(row) for row in CONVERGENCE]
    result = results.Result("convergence", Path("convergence.json"), experiment(rows, model="m"))
    found, contests = results.losses(result)
    assert contests == 2
    assert [(row["ours"], row["lower"]) for row in found] == [
        ("singlequant, rtn, clip 1", "spinquant, 5 steps, rtn, clip 1")]
    assert found[0]["ratio"] == pytest.approx(0.5)
    rows[-1]["kl_mean"] = 0.03
    found, _ = results.losses(result)
    assert [row["ours"] for row in found] == ["singlequant, rtn, clip 1",
                                              "default (balanced), mse, clip 0.8"]
    rows[1]["weights"] = "mse"  # no longer singlequant's rounding
    found, _ = results.losses(result)
    assert [row["ours"] for row in found] == ["default (balanced), mse, clip 0.8"]
    rows[1]["kl_mean"] = 0.06
    assert results.losses(result) == ([], 2)
    assert "0 have a method of lower KL beside them." in results.lost([result])
    assert ("hadamard takes 1.000 CPU s to quantize, `singlequant` takes 2.000 CPU s."
            in results.lost([result]))


def test_losses_of_a_comparison_are_means_over_seeds():
    def row(method, kl, seed, default=False):
        config = sq.QuantConfig("w4a4", method, "rtn", 4, clip=1.0, seed=seed)
        e = {"perplexity": 1.0, "tokens": 4, "predictions": 3, "seq_len": 4, "seconds": 0.0,
             "kl_mean": kl}
        return {"method": method, "scheme": "w4a4", "default": default,
                "config": config.to_json(), "results": [e], "tasks": {}, "seconds": {},
                "peak_memory": 1, "bytes_on_disk": 1, "error": None}

    values = {"model": "m", "fingerprint": "", "texts": ["t"], "seq_len": 4, "calibration": "c",
              "machine": ENVIRONMENT,
              "rows": [row("random", 0.1, 0), row("random", 0.3, 1), row("singlequant", 0.25, 0),
                       row("singlequant", 0.21, 1)]}
    found, contests = results.losses(results.Result("compare", Path("c.json"), values))
    assert contests == 1
    assert [(r["lower"], r["KL"], r["its KL"]) for r in found] == [
        ("random, rtn, clip 1", pytest.approx(0.23), pytest.approx(0.2))]


def test_slower_models_are_named():
    def row(scheme, method, ratio):
        return {"scheme": scheme, "method": method, "prefill_ratio": ratio}

    rows = [row("16-bit", "original", 1.0), row("w4a4", "none", 0.5), row("w4a8", "none", 2.0)]
    values = experiment(rows, model="m")
    assert results.slower([results.Result("latency", Path("latency.json"), values)]) == [
        "m: w4a4 none is slower than the original (its speed relative to that: prefill: 0.50).",
        "m: w4a4 none is slower than W4A8 (its speed relative to that: prefill: 0.25).",
    ]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [("notes", experiment([{"a": 1}]), "notes.json: expected rows of"),
     ("ablation", experiment([]), "found 0 rows"),
     ("ablation", {"no": "rows"}, "expected the JSON of an experiment"),
     ("ablation", experiment([{"a": 1}], figure="ablation.png"), "expected the figure"),
     ("ablation", experiment([{"a": 1}], figure="../a.png"), "name of a file beside it"),
     (None, None, "found none")],
)
def test_what_is_no_result_is_refused(tmp_path, name, values, message):
    folder, page = tmp_path / "in", tmp_path / "results.md"
    folder.mkdir()
    if name:
        write_json(folder, name, values)
    with pytest.raises(SystemExit, match=message):
        results.main(["--from", str(folder), "--out", str(page)])
    assert not page.exists()


def test_the_summarys_head_stands_between_the_marks(model, text, tmp_path):
    folder, summary = tmp_path / "in", tmp_path / "summary.md"
    curves = {"settings": {"steps": 5}}
    write_json(folder, "convergence", experiment(CONVERGENCE, model="m", curves=curves))
    found = sq.compare(model, methods=["none"], schemes=["w4a4"], texts=[text], seq_len=64,
                       windows=2, calibration_tokens=128, calibration=text)
    found.to_json(folder / "compare.json")
    arguments = ["--from", str(folder), "--out", str(tmp_path / "docs" / "results.md"),
                 "--summary", str(summary)]
    summary.write_text("no marks")
    with pytest.raises(SystemExit, match="summary.md: expected <!-- results:begin -->"):
        results.main(arguments)
    summary.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    results.main(arguments)
    once = summary.read_text()
    assert once.startswith(f"before\n{results.BEGIN}\n")
    assert once.endswith(f"{results.END}\nafter\n")
    assert "old" not in once
    assert f"| w4a4 | none | rtn | {found.rows[1].results[0].perplexity:.3f} |" in once
    assert "SpinQuant's 5 steps take 90.00 CPU s on m" in once
    assert "45.00 times less" in once
    assert "(docs/results.md)" in once
    results.main(arguments)
    assert summary.read_text() == once


def test_the_repositorys_summary_has_one_pair_of_marks():
    text = (ROOT / "docs" / "summary.md").read_text()
    assert text.count(results.BEGIN) == text.count(results.END) == 1
