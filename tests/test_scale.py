# SPDX-License-Identifier: Apache-2.0
"""The simulator of docs/scale.md: schedules whose times can be told by hand, and its own check."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.scale import Costs, Job, alone, carry, job_of, simulate

JOB = Job(layers=6, parts=2, pass_part=1.0, noise=0.5, make_layer=4.0)


def test_one_worker_takes_all_calls_one_after_the_other():
    times = simulate(JOB, 1)
    assert times.whole == times.work == 6 * (2 * 1.0 + 0.5 + 4.0)
    assert times.stream == 6 * 2.5


def test_many_workers_take_the_longest_chain():
    # the noise of the last layer begins with its pass, and is shorter
    assert simulate(JOB, 100).whole == 6 * 1.0 + 4.0
    assert simulate(replace(JOB, noise=3.0), 100).stream == 5 * 1.0 + 3.0


def test_layers_go_in_rounds():
    assert simulate(JOB, 4).whole - simulate(JOB, 4).stream == 2 * 4.0  # 4 layers, then 2


def test_layers_beside_a_stream_of_their_own():
    """Two workers: one passes, the other makes layers; the last five wait for each other."""
    assert carry(3, 1, 1.0, 4.0, 2) == (8.0, 15.0)
    apart = replace(JOB, parts=1, few=0.25)
    assert simulate(apart, 100).whole == pytest.approx(5 * 0.25 + 0.5 + 5 * 1.0 + 4.0)
    assert simulate(replace(apart, noise=0.0, few=None), 100).whole == 5 * 1.0 + 4.0


def test_passes_go_before_layers():
    """One worker: a layer is made only when no pass waits."""
    whole, work = carry(3, 1, 1.0, 10.0, 1)
    assert whole == work == 33.0


@pytest.fixture
def costs():
    return Costs.of(scale.newest_costs())


def test_costs_are_those_of_the_results(costs):
    assert costs.disk > 1e8
    assert min(costs.token, costs.solve, costs.gptq, costs.mse) > 0
    # put together again, they are the measured seconds of a layer of LLaMA-2-7B
    layer = scale.LLAMA_2_7B.layer_weights / 1e9
    job = job_of(scale.MODELS[1], replace(costs, disk=1e30), 1)
    rows = json.loads(scale.newest_costs().read_text())["rows"]
    (gptq,) = (row["warm, s per 10^9"] for row in rows if row.get("weights") == "gptq")
    (long,) = (row["value"] for row in rows if row.get("figure", "").startswith(
        "calibration, 8192"))
    assert job.make_layer == pytest.approx((gptq + long + costs.solve) * layer, rel=1e-6)


@pytest.mark.parametrize("model", scale.MODELS, ids=lambda model: model.name)
def test_more_workers_are_never_slower_by_more_than_their_own_reading(costs, model):
    times = [simulate(job_of(model, costs, n), n).whole for n in (4, 16, 64)]
    assert times[0] > times[1] >= times[2]
    chain = scale.longest_chain(job_of(model, costs, 10_000))
    assert simulate(job_of(model, costs, 10_000), 10_000).whole == pytest.approx(chain)
    assert simulate(job_of(model, costs, 1), 1).whole > 0.99 * alone(model, costs)
    assert scale.moved_bytes(model, 16) >= scale.moved_bytes(model, 1)


def test_page_has_the_table_of_the_newest_costs(costs):
    page = (Path(__file__).resolve().parents[1] / "docs" / "scale.md").read_text()
    made = scale.with_table(page, costs, scale.source_text(scale.newest_costs()))
    assert made == page, "python -m benchmarks.scale --page docs/scale.md"


@pytest.mark.slow
def test_simulated_time_is_near_the_measured_one(tmp_path):
    (row,) = scale.check([2], tmp_path / "check")
    assert row["simulated"] < row["measured"]  # starting processes, embedding and head are left out
    assert row["simulated"] > 0.3 * row["measured"]
