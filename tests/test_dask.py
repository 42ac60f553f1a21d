# SPDX-License-Identifier: Apache-2.0
"""Dask: equal bytes when a worker is killed, a clear error and a way on when the scheduler is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import singlequant as sq
from singlequant.cli.main import main
from singlequant.distributed import Call, DaskWorkers

pytest.importorskip("distributed", reason="needs singlequant[distributed]")

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = "the quick brown fox rotates its tail. " * 200
START_SECONDS = 120
ARGUMENTS = ["--calibration-tokens", "256", "--calibration-window", "32", "--no-check"]


class Cluster:
    """A scheduler and workers, each a process of its own, as they would be on several machines."""

    def __init__(self, folder: Path, workers: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self._folder = folder
        self.scheduler = self._start("dask_scheduler", "--host", "127.0.0.1", "--port",
                                     self.address.rpartition(":")[2], "--no-dashboard")
        self.workers = [self._start("dask_worker", self.address, "--nthreads", "1", "--no-nanny",
                                    "--no-dashboard", "--local-directory", str(folder))
                        for _ in range(workers)]
        self._await(workers)

    def _start(self, module: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"distributed.cli.{module}", *arguments]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "SINGLEQUANT_NUM_THREADS": "1"}
        log = (self._folder / f"{module}-{time.monotonic_ns()}.log").open("wb")
        with log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment,
                                    start_new_session=True)

    def _await(self, count: int) -> None:
        """Until all workers have come."""
        from distributed import Client

        end = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                with Client(self.address, timeout=5, set_as_default=False) as client:
                    client.wait_for_workers(count, timeout=START_SECONDS)
                return
            assert time.monotonic() < end, "the cluster did not start"

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path_factory):
    """Makes clusters of so many workers, which end with the test."""
    with contextlib.ExitStack() as stack:
        def start(workers: int) -> Cluster:
            found = Cluster(tmp_path_factory.mktemp("dask"), workers)
            stack.callback(found.close)
            return found

        yield start


@pytest.fixture
def job(make_checkpoint, tmp_path):
    """The model, and the words of the command that quantizes it to a folder."""
    model = make_checkpoint(tmp_path / "model", layers=6)
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES)

    def command(out: str, *options: str) -> list[str]:
        return ["quantize", str(model), str(tmp_path / out), "--calibration", str(text),
                *ARGUMENTS, *options]

    assert main(command("alone")) == 0
    return command


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def spread(cluster: Cluster) -> list[str]:
    return ["--executor", "dask", "--scheduler", cluster.address]


def test_bytes_are_equal_when_one_of_four_workers_is_killed_and_one_is_slow(
    cluster, job, tmp_path
):
    four = cluster(4)
    victim, slow = four.workers[:2]

    def trouble() -> None:
        """Once the first layer is there: one worker dies, another stands still for a while."""
        partial = tmp_path / "out.partial"
        end = time.monotonic() + START_SECONDS
        while not list(tmp_path.glob("out.workers-*/layer-*")) and time.monotonic() < end:
            time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)
        slow.send_signal(signal.SIGSTOP)
        killed_at.append(len(list(partial.glob("model-*"))))
        time.sleep(2)
        slow.send_signal(signal.SIGCONT)

    killed_at: list[int] = []
    thread = threading.Thread(target=trouble)
    thread.start()
    code = main(job("out", *spread(four)))
    thread.join()
    assert code == 0
    assert victim.wait() == -signal.SIGKILL
    assert killed_at[0] < 7  # not all shards were there
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_killed_scheduler_is_named_and_the_run_goes_on(cluster, job, tmp_path, capsys):
    one = cluster(1)

    def kill() -> None:
        end = time.monotonic() + START_SECONDS
        while not list((tmp_path / "out.partial").glob("model-00003*.safetensors")):
            if time.monotonic() > end:
                return
            time.sleep(0.005)
        one.scheduler.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    code = main(job("out", *spread(one)))
    thread.join()
    error = capsys.readouterr().err.splitlines()
    assert code == 2, error
    assert error[-1].startswith(f"singlequant: scheduler {one.address}: the connection was lost; ")
    assert error[-1].endswith("the same run with resume (--resume) goes on")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.workers-*"))
    two = cluster(2)
    assert main(job("out", "--resume", *spread(two))) == 0
    assert "resumed" in capsys.readouterr().out
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")


def test_client_that_is_closed_says_that_the_connection_was_lost(cluster):
    one = cluster(1)
    with DaskWorkers(one.address) as workers:
        assert workers.count == 1
        workers._client.close()
        for use in (lambda: workers.count, lambda: workers._submit(os.getpid)):
            with pytest.raises(ConnectionError, match=f"{one.address}: the connection was lost"):
                use()


def test_call_that_kills_worker_after_worker_ends_the_run(cluster):
    with (
        DaskWorkers(cluster(4).address) as workers,
        pytest.raises(ConnectionError, match="workers died one after the other over the same call"),
    ):
        workers.run([Call(os.abort)])


def test_scheduler_that_is_not_there_is_named(job, capsys, monkeypatch):
    monkeypatch.setattr("singlequant.distributed.CONNECT_SECONDS", 1)
    assert main(job("out", "--executor", "dask", "--scheduler", "tcp://127.0.0.1:9")) == 2
    assert "singlequant: scheduler tcp://127.0.0.1:9: no connection: " in capsys.readouterr().err


def test_worker_that_does_not_see_the_model_says_so(cluster, make_checkpoint, tmp_path):
    model = make_checkpoint(tmp_path / "model")
    with DaskWorkers(cluster(1).address) as workers:
        checkpoint = sq.load_checkpoint(model)
        assert checkpoint.fingerprint  # read before it goes
        model.rename(tmp_path / "elsewhere")
        with pytest.raises(sq.FormatError, match="workers must see the model under the path"):
            workers.run([Call(repr, (checkpoint,))])
