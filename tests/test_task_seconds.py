"""Seconds of a task in transformers and in ours, through the harness."""

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra 'evaluation'")
pytest.importorskip("torch", reason="needs the torch extra")

import singlequant as sq  # noqa: E402
from benchmarks.task_seconds import main  # noqa: E402

TASKS = Path(__file__).parent / "data" / "tasks"


def test_both_routes_answer_the_same_questions(tmp_path, capsys):
    model, out = sq.bundled_model(), tmp_path / "out"
    sq.quantize_folder(model, out, sq.QuantConfig(calibration_tokens=512))
    main([str(model), "--ours", str(out), "--tasks", "local_choose", "--task-folder", str(TASKS),
          "--limit", "2", "--dtypes", "float32", "--repeats", "1", "--json", str(tmp_path / "r")])
    rows = json.loads((tmp_path / "r").read_text())["rows"]
    dtype = sq.load_checkpoint(model).dtype
    assert [row["model"] for row in rows] == [
        "transformers float32", f"singlequant {dtype}", "singlequant w4a8"]
    assert {row["questions"] for row in rows} == {2}
    assert rows[0]["acc"] == rows[1]["acc"]
    assert rows[0]["times_as_fast"] == 1
    assert all(row["median"] > 0 for row in rows)
    said = capsys.readouterr().out
    assert said.count("local_choose") == 3
    assert "singlequant w4a8" in said
