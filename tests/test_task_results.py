"""The harness's own results file, written by `eval --output`, and the seconds of a task."""

import json
from pathlib import Path

import numpy as np
import pytest

import singlequant as sq
from singlequant import harness
from singlequant.cli.main import main
from singlequant.harness.results import ResultsFolder

TASKS = Path(__file__).parent / "data" / "tasks"
BOTH = ["local_choose", "local_write"]


@pytest.fixture(scope="module", autouse=True)
def need_lm_eval():
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: the extra 'evaluation'")


def results_of(folder):
    """(the one results file under a folder, its values)."""
    path, = folder.rglob("results_*.json")
    return path, json.loads(path.read_text())


def test_file_is_what_the_harness_writes_of_the_same_run(model, tmp_path, capsys):
    import lm_eval
    from lm_eval.loggers import EvaluationTracker

    from singlequant.harness.run import found_tasks

    assert harness.SingleQuantLM  # registers the name
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    with found_tasks(BOTH, TASKS) as manager:
        results = lm_eval.simple_evaluate(
            model="singlequant", model_args={"path": str(model)}, tasks=BOTH, limit=3,
            task_manager=manager, bootstrap_iters=1000, evaluation_tracker=tracker)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    main(["eval", str(model), "--tasks", ",".join(BOTH), "--task-folder", str(TASKS), "--limit",
          "3", "--output", str(tmp_path / "ours"), "--log-samples"])
    said = capsys.readouterr().out
    (path, ours), (other, theirs) = (results_of(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert path.parent.name == other.parent.name
    assert f"wrote           {path}" in said
    for key in ("results", "versions", "n-shot", "n-samples", "higher_is_better", "task_hashes",
                "model_name", "model_source", "lm_eval_version", "chat_template"):
        assert ours[key] == theirs[key], key
    assert ours["configs"].keys() == theirs["configs"].keys() == set(BOTH)
    assert ours["config"].keys() == theirs["config"].keys()
    for key in ("model", "model_args", "limit", "model_num_parameters", "model_dtype"):
        assert ours["config"][key] == theirs["config"][key], key


def test_samples_are_the_answers_of_the_metrics(model, tmp_path):
    output = tmp_path / "new" / "folder"
    found = harness.score_tasks(sq.load(model), BOTH, TASKS, output=output, log_samples=True)
    _, written = results_of(output)
    assert [path.suffix for path in found.files] == [".jsonl", ".jsonl", ".json"]
    assert all(path.is_file() for path in found.files)
    path, = output.rglob("samples_local_choose_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    accuracy = written["results"]["local_choose"]["acc,none"]
    assert np.mean([s["acc"] for s in samples]) == accuracy == found.metrics["local_choose"]["acc"]
    assert len(samples) == written["n-samples"]["local_choose"]["effective"]
    assert written["config"]["singlequant"]["singlequant"] == sq.__version__


def test_without_log_samples_there_is_the_results_file_alone(model, tmp_path):
    name = tmp_path / "run.json"  # the harness puts the date behind the stem
    loaded = sq.load(model)
    metrics = harness.evaluate_tasks(loaded, ["local_choose"], TASKS, limit=2, output=name)
    path, = tmp_path.glob("*.json")
    assert path.name.startswith("run_")
    written = json.loads(path.read_text())
    assert written["results"]["local_choose"]["acc,none"] == metrics["local_choose"]["acc"]
    assert "samples" not in written
    assert not list(tmp_path.rglob("*.jsonl"))


def test_seconds_are_those_of_a_tasks_requests(model, tmp_path, capsys):
    arguments = ["eval", str(model), "--tasks", ",".join(BOTH), "--task-folder", str(TASKS),
                 "--limit", "2"]
    assert main([*arguments, "--json", "--output", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    path, written = results_of(tmp_path)
    seconds = written["config"]["task_seconds"]
    assert seconds.keys() == set(BOTH)
    assert 0 < sum(seconds.values()) < float(written["total_evaluation_time_seconds"])
    assert {task: found["seconds"] for task, found in printed["tasks"].items()} == seconds
    assert printed["files"] == [str(path)]
    assert main(arguments) == 0
    assert "local_choose             seconds" in capsys.readouterr().out


def test_output_that_cannot_be_is_refused_before_the_tasks_run(model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["eval", str(model), "--tasks", "local_choose", "--task-folder", str(TASKS)]
    assert main([*arguments, "--output", str(tmp_path / "file")]) == 2
    assert f"found the file {tmp_path / 'file'}" in capsys.readouterr().err
    assert main([*arguments, "--log-samples"]) == 2
    assert "--log-samples: needs --output" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path != model] == ["file"]


def test_what_the_tracker_could_not_write_is_an_error(tmp_path):
    folder = ResultsFolder(tmp_path / "out", log_samples=False)
    with pytest.raises(OSError, match="expected 1 files of lm-evaluation-harness, which wrote 0"):
        folder.save(folder.begin(), {"config": {}, "results": {("no", "name"): 1}}, "model")
    assert not list((tmp_path / "out").iterdir())
