"""Methods side by side: the same figures as one by one, resumable, whole files, honest failures."""

import csv
import hashlib
import json
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import singlequant as sq
from singlequant.checkpoint.folder import Checkpoint
from singlequant.cli.main import main
from singlequant.files import check_file, check_picture
from singlequant.harness import Answers, PairedDifference, TaskScores
from singlequant.methods.registry import METHODS, Method
from singlequant.runtime.model import Model
from singlequant.study.compare import Row, RowsFile, default_methods
from singlequant.study.evaluate import CachedScorer

evaluator_module = sys.modules["singlequant.study.compare.evaluator"]
sweep_module = sys.modules["singlequant.sweep.sweep"]
run_module = sys.modules["singlequant.study.compare.run"]
rotate_module = sys.modules["singlequant.methods.solve"]
COMPARED = ("none", "hadamard")


def compare(model, text, **changes) -> sq.Comparison:
    """Two methods, one scheme, two short windows of one text unless `changes` says otherwise."""
    options = {"methods": COMPARED, "schemes": ("w4a4",), "texts": [text], "seq_len": 32,
               "windows": 2, "calibration": text, "calibration_tokens": 64, "defaults": False}
    return sq.compare(model, **{**options, **changes})


def options(text, *more):
    """The same on the command line."""
    return ["--methods", "none,hadamard", "--schemes", "w4a4", "--text", str(text), "--seq-len",
            "32", "--windows", "2", "--calibration", str(text), "--calibration-tokens", "64", *more]


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def figures(comparison):
    """What does not depend on the clock."""
    return [(row.config, row.default, row.error, row.bytes_on_disk,
             [(r.perplexity, r.kl_mean, r.kl_p99, r.top1_agreement) for r in row.results])
            for row in comparison.rows]


def interrupt_at(step):
    """A progress callback that is interrupted at that step."""

    def progress(done, total):
        if done == step:
            raise KeyboardInterrupt

    return progress


def test_rows_are_what_quantize_and_perplexity_give(tmp_path):
    source, tokens = sq.bundled_model(), 256
    found = sq.compare(source, methods=["none", "hadamard"], schemes=["w4a4", "w4a8"],
                       seq_len=128, windows=2, calibration_tokens=tokens, out=tmp_path / "out")
    original = sq.load(source)
    ids = original.encode(sq.bundled_text("heldout"))[: 2 * 128]
    plain = sq.perplexity(original, ids, 128)
    assert found.rows[0].results[0].perplexity == plain.perplexity
    equal = [sq.QuantConfig(scheme, method, "rtn", 4, clip=1.0, calibration_tokens=tokens)
             for scheme in ("w4a4", "w4a8") for method in COMPARED]
    default = [sq.QuantConfig(scheme, calibration_tokens=tokens) for scheme in ("w4a4", "w4a8")]
    expected = [*equal[:2], default[0], *equal[2:], default[1]]
    assert [row.config for row in found.rows[1:]] == expected
    assert [row.default for row in found.rows[1:]] == [False, False, True] * 2
    for number, row in enumerate(found.rows[1:]):
        out = tmp_path / str(number)
        summary = sq.quantize_folder(source, out, row.config)
        alone = sq.perplexity(sq.load(out), ids, 128, reference=original)
        for name in ("perplexity", "kl_mean", "kl_p99", "top1_agreement", "reference_perplexity"):
            assert getattr(row.results[0], name) == getattr(alone, name)
        assert row.bytes_on_disk == summary.bytes_after
        kept, = (tmp_path / "out").glob(f"{row.scheme}-{row.method}-{row.config.weights}-*")
        assert digests(kept) == digests(out)
        assert row.peak_memory > 0
        assert row.seconds["calibrate"] > 0
        assert row.seconds["quantize"] > 0


def test_calibration_and_original_run_once_for_all(model, text, monkeypatch):
    calibrated, evaluated, solved = [], [], []
    calibrate, hidden, solve = (sweep_module.calibrate, Model.hidden_states,
                                sweep_module.solve)
    monkeypatch.setattr(sweep_module, "calibrate",
                        lambda *a, **k: calibrated.append(1) or calibrate(*a, **k))
    monkeypatch.setattr(sweep_module, "solve", lambda *a: solved.append(1) or solve(*a))
    monkeypatch.setattr(
        Model, "hidden_states",
        lambda self, w: evaluated.append(self.checkpoint.quantized) or hidden(self, w))
    found = compare(model, text, schemes=("w4a4", "w4a8"), weights=("rtn", "mse"))
    assert len(found.rows) == 1 + 2 * 2 * 2
    assert len(calibrated) == 1
    assert len(solved) == 2 * 2  # layers x methods
    assert evaluated.count(False) == 1
    assert evaluated.count(True) == 8


def test_rerun_skips_what_is_finished(model, text, tmp_path, monkeypatch):
    first = compare(model, text, out=tmp_path / "out")
    ran = []
    solve, evaluate = sweep_module.solve, evaluator_module.evaluate
    monkeypatch.setattr(sweep_module, "solve",
                        lambda view, s, config: ran.append(config.method) or solve(view, s, config))
    monkeypatch.setattr(evaluator_module, "evaluate",
                        lambda *a: ran.append("evaluate") or evaluate(*a))
    again = compare(model, text, out=tmp_path / "out")
    assert ran == []
    assert again.rows == first.rows  # seconds included: they are the first run's
    more = compare(model, text, out=tmp_path / "out", methods=("none", "art", "hadamard"))
    assert ran == ["art"] * 2 + ["evaluate"]
    assert [row.method for row in more.rows] == ["original", "none", "art", "hadamard"]
    ran.clear()
    compare(model, text, out=tmp_path / "out", windows=3)  # another key in the same folder
    assert ran.count("evaluate") == 3


def test_another_model_in_the_same_folder_has_rows_of_its_own(make_checkpoint, model, text,
                                                              tmp_path):
    first = compare(model, text, out=tmp_path / "out")
    other = compare(make_checkpoint(tmp_path / "other", seed=1), text, out=tmp_path / "out")
    assert all(a.results != b.results for a, b in zip(first.rows, other.rows, strict=True))
    assert figures(compare(model, text, out=tmp_path / "out")) == figures(first)


def test_weights_that_changed_between_runs_have_rows_of_their_own(model, text, tmp_path,
                                                                  monkeypatch):
    """A weight far from the pages that the fingerprint looks at."""
    monkeypatch.setattr(Checkpoint, "fingerprint", "the same")
    first = compare(model, text, out=tmp_path / "out")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] *= -4
    save_file(tensors, model / "model.safetensors")
    again = compare(model, text, out=tmp_path / "out")
    assert figures(again) == figures(compare(model, text))
    assert figures(again) != figures(first)


def test_other_kernels_make_rows_of_their_own(model, text, tmp_path, monkeypatch):
    compare(model, text, out=tmp_path / "out", methods=("none",))
    solved, solve = [], sweep_module.solve
    monkeypatch.setattr(sweep_module, "solve", lambda *a: solved.append(1) or solve(*a))
    compare(model, text, out=tmp_path / "out", methods=("none",))
    assert solved == []
    monkeypatch.setattr(run_module, "kernel_names", lambda: {"table": "other", "blas": "other"})
    compare(model, text, out=tmp_path / "out", methods=("none",))
    assert len(solved) == 2


@pytest.mark.parametrize("step", [1, 2, 3, 4])  # original, layers 0 and 1, first row
def test_interrupted_run_leaves_whole_files_and_goes_on(model, text, tmp_path, step, monkeypatch):
    expected = compare(model, text)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compare(model, text, out=out, progress=interrupt_at(step))
    left = sorted(path.name for path in out.iterdir())
    assert not [name for name in left if name.endswith((".partial", ".tmp"))]
    for path in out.iterdir():
        if path.is_dir():
            sq.load(path)
    solved, solve = [], sweep_module.solve
    monkeypatch.setattr(sweep_module, "solve", lambda *a: solved.append(1) or solve(*a))
    assert figures(compare(model, text, out=out)) == figures(expected)
    assert len(solved) == (0 if step == 4 else 4)  # packed folders are evaluated, not made again


def test_torn_last_line_is_ignored(model, text, tmp_path):
    first = compare(model, text, out=tmp_path / "out")
    rows = tmp_path / "out" / "rows.jsonl"
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-20])
    assert figures(compare(model, text, out=tmp_path / "out")) == figures(first)
    lines = rows.read_bytes().splitlines()
    assert len(lines) == len(whole.splitlines())
    assert all(json.loads(line) for line in lines)


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"key": "a"}', b'{"key": "a", "row": {}}'])
def test_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"key": "a", "built": {}}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: expected a row"), RowsFile(path):
        pass


@pytest.mark.parametrize("content", [b"years", b'{"keys": 1', b'{"key": "a", "built": {}}\nyears'])
def test_file_of_others_is_named_and_left(tmp_path, content):
    path = tmp_path / "rows.json.partial"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.json\.partial: expected rows"), RowsFile(path):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize("end", range(1, 12))
def test_torn_line_is_cut_off_wherever_it_ends(tmp_path, end):
    path, whole = tmp_path / "rows.jsonl", b'{"key": "a", "built": {}}\n'
    path.write_bytes(whole + whole[:end])
    with RowsFile(path) as rows:
        assert rows.built == {"a": {}}
    assert path.read_bytes() == whole


def test_two_runs_at_once_are_refused(model, text, tmp_path):
    (tmp_path / "out").mkdir()
    with (RowsFile(tmp_path / "out" / "rows.jsonl"),
          pytest.raises(ValueError, match="in use by another run")):
        compare(model, text, out=tmp_path / "out")


def test_csv_and_json_parse_back(model, text, tmp_path):
    found = compare(model, text, weights=("rtn", "mse"), group_size=32)
    found.to_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        records = list(csv.DictReader(file))
    assert [(r["method"], r["weights"]) for r in records] == [
        ("original", ""), ("none", "rtn"), ("hadamard", "rtn"), ("none", "mse"),
        ("hadamard", "mse")]
    for record, row in zip(records, found.rows, strict=True):
        assert float(record["perplexity"]) == row.results[0].perplexity
        assert float(record["kl_mean"]) == row.results[0].kl_mean
        assert int(record["disk_bytes"]) == row.bytes_on_disk
    values = json.loads(found.to_json(tmp_path / "rows.json").read_text())
    assert tuple(Row.from_json(row) for row in values["rows"]) == found.rows
    assert values["machine"]["kernels"]["active"] in values["machine"]["kernels"]["runnable"]
    assert values["machine"]["cpus"] >= 1
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {
        ".csv", ".json", ".txt"}


def test_failed_write_leaves_the_old_file(model, text, tmp_path, monkeypatch):
    found = compare(model, text, methods=["none"])
    path = found.to_csv(tmp_path / "rows.csv")
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        found.to_csv(path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("change", "message"), [
    ({"methods": ["rotor"]}, "method: expected one of .*singlequant, paper, .*found 'rotor'"),
    ({"schemes": ["w3a3"]}, "scheme: expected one of w4a4, w4a8, w4a16, found 'w3a3'"),
    ({"weights": ["up"]}, "weights: expected one of rtn, mse.*found 'up'"),
    ({"methods": []}, "methods: expected a list of at least one"),
    ({"methods": "none"}, "methods: expected a list of at least one, found 'none'"),
    ({"tasks": "arc"}, "tasks: expected a list of names, found 'arc'"),
    ({"seq_len": 300}, "seq_len: expected 2 to 256 tokens, the model's maximum, found 300"),
    ({"windows": 0}, "windows: expected at least 1, found 0"),
    ({"texts": []}, "texts: expected at least one file"),
])
def test_bad_arguments_are_named_before_any_work(model, text, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        compare(model, text, out=tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_text_shorter_than_a_window_is_named(model, text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the fox")
    with pytest.raises(ValueError, match=r"short\.txt: text: expected at least one window of 32"):
        compare(model, text, texts=[text, short])


def test_method_that_fails_is_a_row_with_the_reason(model, text, tmp_path, monkeypatch):
    def needs_more(site):
        raise ImportError("the torch extra is missing")

    module = types.ModuleType("made_up")
    module.build = needs_more
    monkeypatch.setitem(sys.modules, "made_up", module)
    monkeypatch.setitem(METHODS, "learned", Method("learned", "", "made_up"))
    found = compare(model, text, methods=("none", "learned", "hadamard"), out=tmp_path / "out")
    assert [row.error for row in found.rows] == [None, None, "the torch extra is missing", None]
    assert "w4a4 learned: the torch extra is missing" in repr(found)
    assert figures(found)[:2] == figures(compare(model, text))[:2]
    assert figures(found)[3] == figures(compare(model, text))[2]
    assert not list((tmp_path / "out").glob("*.partial"))
    assert found.records()[2]["error"] == "the torch extra is missing"
    module.build = lambda site: None
    again = compare(model, text, methods=("none", "learned", "hadamard"), out=tmp_path / "out")
    assert [row.error for row in again.rows] == [None] * 4  # a failure is tried again
    assert again.rows[2].results[0].kl_mean == again.rows[1].results[0].kl_mean


def test_setting_that_does_not_suit_the_model_leaves_the_default_row(model, text):
    found = compare(model, text, group_size=64, defaults=True)  # down_proj has 96 inputs
    assert all("group_size: expected a divisor" in row.error for row in found.rows[1:3])
    assert found.rows[3].default
    assert found.rows[3].results[0].kl_mean > 0


def test_seeds_are_rows_of_their_own_draws(make_checkpoint, tmp_path):
    model = make_checkpoint(tmp_path / "model")
    text = tmp_path / "varied.txt"
    words = np.random.default_rng(0).permutation(np.array(sq.bundled_text("heldout").split()))
    text.write_text(" ".join(words[:2000]))
    found = compare(model, text, methods=["urt"], seeds=(0, 1), defaults=True)
    assert [row.config.seed for row in found.rows[1:]] == [0, 1, 0, 1]
    assert [row.default for row in found.rows[1:]] == [False, False, True, True]
    kl = [row.results[0].kl_mean for row in found.rows[1:]]
    assert kl[0] != kl[1]
    assert "seed" in found.table().splitlines()[0].split()
    assert compare(model, text, methods=["urt"], seeds=[1]).rows[1].results[0].kl_mean == kl[1]


def test_each_text_has_its_columns(model, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("jumps over the lazy dog, and back again: " * 100)
    found = compare(model, text, texts=[text, other])
    assert found.texts == ("text", "other")
    alone = compare(model, text, texts=[other])
    for both, one in zip(found.rows, alone.rows, strict=True):
        assert both.results[1].perplexity == one.results[0].perplexity
    assert {"perplexity[text]", "kl_mean[other]"} <= set(found.records()[0])
    assert "KL other" in found.table().splitlines()[0]
    assert len(found.plot().axes) == 2
    (tmp_path / "folder").mkdir()
    alike = tmp_path / "folder" / "text.txt"
    alike.write_text(other.read_text())
    assert compare(model, text, texts=[text, alike]).texts == (str(text), str(alike))


def test_best_of_each_scheme_is_marked(model, text):
    found = compare(model, text, schemes=("w4a4", "w4a8"), methods=("none", "hadamard", "urt"))
    for scheme in ("w4a4", "w4a8"):
        rows = [row for row in found.rows if row.scheme == scheme]
        best = min(rows, key=lambda row: row.results[0].kl_mean)
        marked = [line for line in found.table().splitlines() if scheme in line and "*" in line]
        assert len(marked) == 1
        assert marked[0].split()[1] == best.method
    markdown = found._repr_markdown_()
    assert markdown.count("|\n|") == 1 + 6 + 1
    assert markdown.count(r"\*") == markdown.count("*") == 3  # two marks and what they mean


def made_scores(model, tasks, folder):
    """Four questions: the original answers 1, 2 and 3, and a quantized model 1, 2 and 4."""
    right = (1.0, 1.0, 0.0, 1.0) if model.checkpoint.quantized else (1.0, 1.0, 1.0, 0.0)
    return TaskScores({task: {"acc": 0.75, "alias": task} for task in tasks},
                      {task: Answers("digest", {"acc": right}) for task in tasks})


def test_tasks_come_from_the_harness(model, text, monkeypatch):
    asked = []

    def score_tasks(model, tasks, folder):
        asked.append((model.checkpoint.quantized, tasks, folder))
        return made_scores(model, tasks, folder)

    monkeypatch.setattr("singlequant.harness.score_tasks", score_tasks)
    found = compare(model, text, methods=["none"], tasks=["arc"])
    assert asked == [(False, ["arc"], None), (True, ["arc"], None)]
    assert [record["arc.acc"] for record in found.records()] == [0.75, 0.75]
    assert "arc acc" in found.table()


def test_tasks_are_paired_with_the_original_also_by_a_later_run(model, text, tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr("singlequant.harness.score_tasks", lambda model, *how: (
        scored.append(model.checkpoint.quantized) or made_scores(model, *how)))
    compare(model, text, methods=["none"], tasks=["arc"], out=tmp_path / "out")
    found = compare(model, text, tasks=["arc"], out=tmp_path / "out")
    assert scored == [False, True, True]  # the original's answers were kept
    original, *rows = found.rows
    assert (original.paired, original.answers["arc"].values) == ({}, {"acc": (1, 1, 1, 0)})
    for row in rows:
        assert row.answers == {}
        assert row.paired["arc"]["acc"] == PairedDifference(
            0.75, 0.75, 0.0, pytest.approx(np.std([0, 0, -1, 1], ddof=1) / 2), 4)
    heading, first, second, _ = found.table().splitlines()
    assert "arc acc  arc acc - original" in heading
    assert first.split("0.7500")[1].split()[0] == "-"
    assert second.split("0.7500")[1].split()[:3] == ["+0.0000", "+-", "0.4082"]
    assert "mean difference of the answers" in repr(found)
    records = found.records()
    assert [r["arc.acc_difference"] for r in records] == [None, 0.0, 0.0]
    assert records[1]["arc.acc_difference_stderr"] == pytest.approx(0.4082, abs=1e-4)
    values = json.loads(found.to_json(tmp_path / "rows.json").read_text())
    assert values["rows"][1]["paired"]["arc"]["acc"]["difference"] == 0
    assert tuple(Row.from_json(row) for row in values["rows"]) == found.rows


def test_rows_without_tasks_have_no_pairs(model, text):
    found = compare(model, text, methods=["none"])
    assert "original:" not in repr(found)
    assert not [name for name in found.records()[0] if "difference" in name]


def test_default_methods_are_all_that_need_no_extra():
    methods = default_methods()
    assert methods[0] == "none"
    assert set(methods) == set(METHODS) - {"spinquant", "efficientqat"}


def test_cached_scorer_runs_each_windows_once(model):
    calls, original = [], sq.load(model)
    cached = CachedScorer(original)
    hidden = original.hidden_states
    original.hidden_states = lambda windows: calls.append(1) or hidden(windows)
    first, second = np.arange(64).reshape(2, 32), np.arange(64).reshape(4, 16)
    for windows in (first, second, first.copy(), second):
        np.testing.assert_array_equal(cached.hidden_states(windows), hidden(windows))
    assert len(calls) == 2
    assert not cached.hidden_states(first).flags.writeable
    states = cached.hidden_states(first)
    np.testing.assert_array_equal(cached.logits(states), original.logits(states))


def test_picture_shows_every_row(model, text, tmp_path):
    found = compare(model, text, group_size=64, schemes=("w4a4", "w4a8"), defaults=True)
    figure = found.plot(tmp_path / "picture.svg")
    assert len(figure.axes) == 2
    for axis, row in zip(figure.axes, (found.rows[3], found.rows[6]), strict=True):
        labels = [label.get_text() for label in axis.get_yticklabels()]
        assert labels == ["none", "hadamard", "balanced (default)"]
        assert [t.get_text() for t in axis.texts] == [
            "failed", "failed", f"{row.results[0].perplexity:.2f}"]
        assert axis.lines[0].get_xdata()[0] == row.results[0].kl_mean
    assert (tmp_path / "picture.svg").read_text().rstrip().endswith("</svg>")


def test_outputs_that_cannot_be_written_are_refused_first(tmp_path):
    with pytest.raises(ValueError, match="expected a file in an existing folder, found no "):
        check_file(tmp_path / "no" / "rows.csv")
    with pytest.raises(ValueError, match="found a folder"):
        check_file(tmp_path)
    with pytest.raises(ValueError, match=r"expected a name that ends in one of .*png.*found \.txt"):
        check_picture(tmp_path / "picture.txt")


def test_options_that_need_another_are_refused(model, text, tmp_path):
    learned = tmp_path / "learned.safetensors"
    with pytest.raises(ValueError, match="task_folder: needs tasks"):
        sq.compare(model, methods=["none"], texts=[text], task_folder=tmp_path)
    with pytest.raises(ValueError, match="learned: needs method spinquant"):
        sq.compare(model, methods=["none"], texts=[text], learned=learned)
    with pytest.raises(sq.FormatError, match=r"learned\.safetensors: no such file"):
        sq.compare(model, methods=["spinquant"], texts=[text], learned=learned)


def test_options_are_one_object_that_keywords_change(model, text):
    given = sq.CompareOptions(methods=COMPARED, schemes=("w4a4",), texts=text, seq_len=32,
                              windows=2, calibration=text, calibration_tokens=64, defaults=False)
    assert given.texts == (text,)
    assert figures(sq.compare(model, given)) == figures(compare(model, text))
    assert len(sq.compare(model, given, methods=["none"]).rows) == 2
    with pytest.raises(TypeError, match="options: expected CompareOptions, found list"):
        sq.compare(model, ["none"])
    with pytest.raises(TypeError, match="rotor"):
        sq.compare(model, given, rotor=1)


# ---- the command line -------------------------------------------------------------------------


def test_command_prints_the_table_and_writes_the_files(model, text, tmp_path, capsys):
    files = {name: tmp_path / f"rows.{name}" for name in ("csv", "json", "png")}
    assert main(["compare", str(model), *options(text, "--csv", str(files["csv"]), "--json",
                                                 str(files["json"]), "--picture",
                                                 str(files["png"]))]) == 0
    printed = capsys.readouterr().out
    values = json.loads(files["json"].read_text())
    assert [row["method"] for row in values["rows"]] == ["original", "none", "hadamard",
                                                        sq.QuantConfig().method]
    for row in values["rows"]:
        assert f"{row['results'][0]['perplexity']:.3f}" in printed
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert len(files["csv"].read_text().splitlines()) == 5
    assert not (tmp_path / "rows.json.partial").exists()


def test_interrupted_command_goes_on_from_the_partial_file(model, text, tmp_path, monkeypatch):
    command = ["compare", str(model), *options(text, "--json", str(tmp_path / "rows.json"))]
    evaluate, count = evaluator_module.evaluate, []

    def stop_at_the_third(*arguments):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(evaluator_module, "evaluate", stop_at_the_third)
    assert main(command) == 130
    assert not (tmp_path / "rows.json").exists()
    assert (tmp_path / "rows.json.partial").exists()
    assert main(command) == 0
    assert len(count) == 3 + 2  # the original and one row were kept
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4


def test_unknown_method_on_the_command_line_lists_the_known(model, text, capsys):
    assert main(["compare", str(model), "--methods", "none,rotor"]) == 2
    error = capsys.readouterr().err
    assert "singlequant, paper" in error
    assert "'rotor'" in error
    assert len(error.splitlines()) == 1


def test_command_in_which_nothing_could_run_fails(model, text, capsys):
    command = ["compare", str(model), *options(text, "--group-size", "64", "--no-default")]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "original" in captured.out
    assert "no method could run: group_size: expected a divisor" in captured.err
