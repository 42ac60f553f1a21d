# SPDX-License-Identifier: Apache-2.0
"""Layers that workers make: the bytes of one process, at any number of workers, whatever dies."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import singlequant as sq
from singlequant import distributed
from singlequant.checkpoint.views import RandomizedHadamard, ResidualCheckpoint, ValueCheckpoint
from singlequant.cli.main import main
from singlequant.distributed import Call, ProcessWorkers, Workers, open_workers
from singlequant.sweep.spread_tasks import load_parts

SENTENCES = "the quick brown fox rotates its tail. " * 200


@pytest.fixture(scope="module")
def two():
    """Two processes that all tests of this file share."""
    with ProcessWorkers(2) as workers:
        yield workers


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(SENTENCES)
    return path


@pytest.fixture
def model(make_checkpoint, tmp_path):
    return make_checkpoint(tmp_path / "model", layers=4)


def config(**changes) -> sq.QuantConfig:
    return sq.QuantConfig(**{"calibration_tokens": 256, "calibration_window": 32, **changes})


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


class Counted(Executor):
    """Threads that stand for any executor: how many calls of each function it was given."""

    def __init__(self, threads: int) -> None:
        self._pool, self.calls = ThreadPoolExecutor(threads), {}

    def submit(self, fn, /, *args, **kwargs) -> Future:
        name = pickle.loads(args[1])[0].__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return self._pool.submit(fn, *args)


@pytest.mark.parametrize("changes", [
    {},
    {"bits": 4, "weights": "mse", "scheme": "w4a4", "group_size": 32},
    {"bits": 4.85, "calibration_bits": 32},
    {"method": "quarot", "bits": 4.5, "weights": "rtn"},
    {"kv_bits": 8, "bits": 4},
], ids=["default", "w4a4-groups", "float", "quarot", "kv8"])
@pytest.mark.parametrize("count", [1, 3])
def test_folder_has_the_bytes_of_one_process(model, tmp_path, text, changes, count):
    sq.quantize_folder(model, tmp_path / "alone", config(**changes), text)
    executor = Counted(count)
    done = []
    summary = sq.quantize_folder(model, tmp_path / "spread", config(**changes), text,
                                 progress=lambda *step: done.append(step),
                                 workers=Workers(executor, count))
    assert digests(tmp_path / "spread") == digests(tmp_path / "alone")
    assert done == [(i, 4) for i in range(1, 5)]
    assert executor.calls["make_layer"] == 4
    parts = 1 if changes.get("calibration_bits") == 32 else count
    noise = config(**changes).bits > 4
    # the layers before the last one needed; in floats the few windows of the noise go by themselves
    passes = 4 if noise else 3
    if noise and changes.get("calibration_bits") == 32:
        passes += 3
    assert executor.calls["pass_part"] == passes * parts
    assert [site.layer for site in summary.sites] == sorted(site.layer for site in summary.sites)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "model", "spread", "text.txt"]


@pytest.mark.parametrize("family", ["qwen3-moe-tied", "opt-350m"])
def test_experts_and_other_families_have_the_bytes_of_one_process(tmp_path, text, family):
    from conftest import copy_golden

    folder = copy_golden(family, tmp_path)
    recipe = config(bits=4.5, calibration_tokens=128, calibration_window=16)
    sq.quantize_folder(folder, tmp_path / "alone", recipe, text)
    sq.quantize_folder(folder, tmp_path / "spread", recipe, text,
                       workers=Workers(Counted(3), 3))
    assert digests(tmp_path / "spread") == digests(tmp_path / "alone")


def test_processes_give_the_bytes_of_one(model, tmp_path, text, two, capsys):
    sq.quantize_folder(model, tmp_path / "alone", config(), text)
    sq.quantize_folder(model, tmp_path / "spread", config(), text, workers=two)
    assert digests(tmp_path / "spread") == digests(tmp_path / "alone")
    command = ["quantize", str(model), str(tmp_path / "shell"), "--calibration", str(text),
               "--calibration-tokens", "256", "--calibration-window", "32", "--no-check",
               "--executor", "processes", "--workers", "1"]
    assert main(command) == 0, capsys.readouterr().err
    assert digests(tmp_path / "shell") == digests(tmp_path / "alone")


# ---- what dies ----------------------------------------------------------------------------------


def die_once(mark: str) -> int:
    """Kills its process, but not a second time."""
    if not os.path.exists(mark):
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_work_of_a_process_that_dies_is_done_again(tmp_path):
    found = []
    with ProcessWorkers(2) as workers:
        calls = [Call(die_once, (str(tmp_path / f"mark{i}"),),
                      then=lambda pid: found.append(pid) or ()) for i in range(3)]
        workers.run(calls)
    assert len(found) == 3
    assert os.getpid() not in found


def test_processes_that_die_again_and_again_end_the_run():
    with (
        ProcessWorkers(1) as workers,
        pytest.raises(ConnectionError, match="processes: workers died 3 times in a row"),
    ):
        workers.run([Call(die, ("",))])


class Broken(Executor):
    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        future.set_exception(distributed.BrokenExecutor("gone"))
        return future


def test_executor_of_others_that_breaks_is_named(model, tmp_path, text):
    with pytest.raises(ConnectionError, match="executor: a worker died .*gone"):
        sq.quantize_folder(model, tmp_path / "out", config(), text, workers=Workers(Broken()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text.txt"]


def test_resumed_run_has_only_the_missing_layers_made(model, tmp_path, text):
    sq.quantize_folder(model, tmp_path / "alone", config(), text)

    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="2 finished layers are in .*--resume"):
        sq.quantize_folder(model, tmp_path / "out", config(), text, progress=stop,
                           workers=Workers(Counted(1), 1))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["alone", "model", "out.partial", "text.txt"]
    executor = Counted(2)
    summary = sq.quantize_folder(model, tmp_path / "out", config(), text, resume=True,
                                 workers=Workers(executor, 2))
    assert executor.calls["make_layer"] == 2
    assert summary.resumed_layers == 2
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")


def test_parts_that_a_killed_run_left_are_removed(model, tmp_path, text):
    left = tmp_path / "out.workers-x"
    left.mkdir()
    (left / "singlequant-workers").touch()
    (left / "stream-0.npy").write_text("")
    others = tmp_path / "out.workers-of-mine"
    others.mkdir()
    (others / "thesis.txt").write_text("years")
    sq.quantize_folder(model, tmp_path / "out", config(), text, workers=Workers(Counted(1), 1))
    assert not left.exists()
    assert (others / "thesis.txt").is_file()


# ---- what is refused ----------------------------------------------------------------------------


def test_worker_that_would_round_in_another_way_is_refused(two, monkeypatch):
    monkeypatch.setattr(distributed, "kernel_names", lambda: {"table": "other", "blas": "none"})
    with pytest.raises(ValueError, match=r"worker \S+: table: expected other, found \w+"):
        two.run([Call(os.getpid)])


def test_not_finite_weight_is_named_and_nothing_stays(make_checkpoint, tmp_path, text):
    from safetensors.numpy import load_file, save_file

    folder = make_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name}, rows 0 to 63: .*NaN or Inf"):
        sq.quantize_folder(folder, tmp_path / "a" / "b" / "out", config(), text,
                           workers=Workers(Counted(2), 2))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("arguments", "text"), [
    (("threads",), "executor: expected one of processes, dask, found 'threads'"),
    (("processes", 0), "workers: expected at least 1, found 0"),
    (("processes", 1, "tcp://a:1"), "scheduler: needs executor dask"),
    (("dask",), "scheduler: executor dask needs the address"),
    (("dask", 2, "tcp://a:1"), "workers: the scheduler says how many"),
])
def test_options_that_do_not_suit_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        open_workers(*arguments)


@pytest.mark.parametrize("option", [["--workers", "2"], ["--scheduler", "tcp://a:1"]])
def test_options_of_an_executor_need_one(model, tmp_path, capsys, option):
    assert main(["quantize", str(model), str(tmp_path / "out"), *option]) == 2
    assert capsys.readouterr().err == f"singlequant: {option[0]}: needs --executor\n"


def test_model_that_changed_or_is_not_there_is_named_by_a_worker(make_checkpoint, tmp_path):
    checkpoint = sq.load_checkpoint(make_checkpoint(tmp_path / "m"))
    pickled = pickle.dumps(checkpoint)
    assert pickle.loads(pickled).fingerprint == checkpoint.fingerprint
    reduce, (path, _) = checkpoint.__reduce__()
    with pytest.raises(sq.FormatError, match="expected the model that the run began with"):
        reduce(path, "0" * 64)
    (tmp_path / "m").rename(tmp_path / "elsewhere")
    with pytest.raises(sq.FormatError, match="no such folder .on .*: workers must see the model"):
        reduce(path, "1" * 64)


def test_views_are_sent_without_what_they_computed(make_checkpoint, tmp_path):
    checkpoint = sq.load_checkpoint(make_checkpoint(tmp_path / "m"))
    for view in (ValueCheckpoint(checkpoint),
                 ResidualCheckpoint(checkpoint, RandomizedHadamard(64, 1))):
        view.layer(0), view.outer
        pickled = pickle.dumps(view)
        assert len(pickled) < 4096
        again = pickle.loads(pickled)
        np.testing.assert_array_equal(again.layer(1).linears["o"].weight,
                                      view.layer(1).linears["o"].weight)


# ---- pieces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("cuts", [[0, 8], [0, 1, 8], [0, 3, 4, 8]])
def test_parts_give_the_windows_that_the_whole_gives(tmp_path, every, cuts):
    rows = np.arange(8 * 4 * 2, dtype=np.float32).reshape(32, 2)
    paths = []
    for a, b in zip(cuts, cuts[1:], strict=False):
        paths.append(str(tmp_path / f"{a}.npy"))
        np.save(paths[-1], rows[4 * a : 4 * b])
    expected = rows.reshape(8, 4, 2)[::every].reshape(-1, 2)
    np.testing.assert_array_equal(load_parts(paths, every, 4), expected)


def test_calls_follow_each_other_in_order():
    seen = []

    def follow(number):
        seen.append(number)
        return [Call(max, (number + 1, 0), (0,), follow)] if number < 3 else ()

    with Workers(ThreadPoolExecutor(1), 1) as workers:
        workers.run([Call(max, (0, 0), (0,), follow)])
    assert seen == [0, 1, 2, 3]
