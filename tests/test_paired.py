"""Differences of two models question by question, and the answers that they are made of."""

import json
from pathlib import Path

import numpy as np
import pytest

import singlequant as sq
from singlequant import harness
from singlequant.cli.main import main
from singlequant.harness import Answers, PairedDifference, differences_json, paired_differences
from singlequant.harness.paired import answers_of

TASKS = Path(__file__).parent / "data" / "tasks"


def need_lm_eval():
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: the extra 'evaluation'")


def logged(doc_id, filter_name="none", **values):
    """A sample as the harness logs it."""
    return {"doc_id": doc_id, "doc_hash": f"hash {doc_id}", "filter": filter_name,
            "metrics": list(values), **values}


def test_difference_is_the_mean_of_the_differences_with_its_standard_error():
    rng = np.random.default_rng(0)
    original = rng.integers(0, 2, 400).astype(float)
    quantized = np.where(rng.random(400) < 0.1, 1 - original, original)
    found = paired_differences({"t": Answers("q", {"acc": tuple(quantized)})},
                               {"t": Answers("q", {"acc": tuple(original)})})["t"]["acc"]
    d = quantized - original
    assert (found.original, found.quantized) == (original.mean(), quantized.mean())
    assert found.difference == pytest.approx(d.mean())
    assert found.stderr == pytest.approx(np.sqrt(np.sum((d - d.mean()) ** 2) / 399 / 400))
    apart = np.sqrt((original.var(ddof=1) + quantized.var(ddof=1)) / 400)
    assert found.stderr < apart / 2
    assert str(found) == f"{d.mean():+.4f} +- {found.stderr:.4f}"


def test_equal_answers_differ_by_nothing_and_one_question_has_no_error():
    same = {"t": Answers("q", {"acc": (1.0, 0.0, 1.0)})}
    assert paired_differences(same, same)["t"]["acc"] == PairedDifference(2 / 3, 2 / 3, 0, 0, 3)
    found = paired_differences({"t": Answers("q", {"acc": (0.0,)})},
                               {"t": Answers("q", {"acc": (1.0,)})})
    assert found["t"]["acc"].stderr is None
    assert str(found["t"]["acc"]) == "-1.0000"
    assert json.loads(json.dumps(differences_json(found), allow_nan=False)) == {"t": {"acc": {
        "original": 1.0, "quantized": 0.0, "difference": -1.0, "stderr": None, "questions": 1}}}


def test_only_common_tasks_of_the_same_questions_are_paired():
    ours = {"a": Answers("q", {"acc": (1.0,), "f1": (0.5,)}), "b": Answers("q", {})}
    theirs = {"a": Answers("q", {"acc": (1.0,)}), "c": Answers("q", {"acc": (1.0,)})}
    found = paired_differences(ours, theirs)
    assert {task: set(metrics) for task, metrics in found.items()} == {"a": {"acc"}}
    with pytest.raises(ValueError, match="a: expected the same questions for both models"):
        paired_differences(ours, {"a": Answers("other", {"acc": (1.0,)})})


def test_answers_are_of_metrics_that_are_means_in_the_order_of_the_questions():
    samples = [logged(i, acc=float(i == 2), likelihood=-3.0 * i, words=(1.0, 2)) for i in (2, 0, 1)]
    samples += [logged(i, "strict", match=i > 0) for i in (0, 1, 2)]
    found = answers_of(samples, {"acc": 1 / 3, "likelihood": np.exp(3.0), "match,strict": 2 / 3})
    assert found.values == {"acc": (0.0, 0.0, 1.0), "match,strict": (0.0, 1.0, 1.0)}
    assert found.questions == answers_of(samples[::-1], {}).questions
    assert found.questions != answers_of(samples[1:3], {}).questions


def test_answers_go_through_json():
    answers = Answers("digest", {"acc": (1.0, 0.0), "f1": (0.25, 1.0)})
    text = json.dumps(answers.to_json())
    assert '"acc": [1, 0]' in text
    assert Answers.from_json(json.loads(text)) == answers


def test_answers_are_those_of_each_question(model):
    need_lm_eval()
    loaded = sq.load(model)
    scores = harness.score_tasks(loaded, ["local_both"], TASKS)
    assert scores.metrics == harness.evaluate_tasks(loaded, ["local_both"], TASKS)
    assert set(scores.answers) == {"local_choose", "local_write"}
    for task, answers in scores.answers.items():
        assert answers.values
        for metric, values in answers.values.items():
            assert np.mean(values) == pytest.approx(scores.metrics[task][metric])
    lines = (TASKS / "questions.jsonl").read_text().splitlines()
    assert len(scores.answers["local_choose"].values["acc"]) == len(lines)
    part = harness.score_tasks(loaded, ["local_choose"], TASKS, limit=2).answers
    with pytest.raises(ValueError, match="local_choose: expected the same questions"):
        harness.paired_differences(part, scores.answers)


def test_eval_against_a_model_prints_the_paired_difference(model, text, tmp_path, capsys):
    need_lm_eval()
    config = sq.QuantConfig(method="none", weights="rtn", calibration_tokens=64)
    sq.quantize_folder(model, tmp_path / "out", config, text)
    capsys.readouterr()
    how = ["eval", str(tmp_path / "out"), "--tasks", "local_choose,stdlib_perplexity",
           "--task-folder", str(TASKS), "--limit", "3", "--against", str(model)]
    assert main([*how, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values["paired"]["local_choose"]) == {"acc", "acc_norm"}
    assert values["paired"]["stdlib_perplexity"] == {}  # no mean over documents
    for metric, found in values["paired"]["local_choose"].items():
        assert found["questions"] == 3
        assert found["quantized"] == values["tasks"]["local_choose"][metric]
        assert found["original"] == values["original"]["local_choose"][metric]
        assert found["difference"] == pytest.approx(found["quantized"] - found["original"])
    assert main(how) == 0
    found = values["paired"]["local_choose"]["acc"]
    assert (f"  original {found['original']:.4f}  difference {found['difference']:+.4f} +- "
            f"{found['stderr']:.4f} (3 questions, paired)\n") in capsys.readouterr().out
