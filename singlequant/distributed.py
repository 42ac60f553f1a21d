# SPDX-License-Identifier: Apache-2.0
"""Work that is spread over processes and machines: one interface to concurrent.futures' executors.

    with open_workers("dask", scheduler="tcp://host:8786") as workers:
        quantize_folder(MODEL, OUT, workers=workers)

Workers give the bytes that one process gives, or none: a worker whose kernels or whose version are
others is refused.
"""

from __future__ import annotations

import heapq
import multiprocessing
import os
import pickle
import signal
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from . import _C
from .info import __version__, kernel_names

EXECUTORS = ("processes", "dask")
POLL_SECONDS = 1.0  # between two looks at whether the workers are still there
DEATHS = 3  # of workers, one after the other, before a run gives up
CONNECT_SECONDS = 10


def _begin_process(threads: int) -> None:
    """What a process of ours does first. Ctrl-C, and the end of a terminal, go to it as well, and
    its parent answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _C.set_num_threads(threads)


def no_more(_: Any) -> Iterable[Call]:
    """What follows a call that nothing follows."""
    return ()


@dataclass(frozen=True)
class Call:
    """A call for a worker. then(result) is called here, and gives calls that can follow now.

    Of several calls that wait, those of the least `order` go first. Function, arguments and result
    are pickled.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    order: tuple[int, ...] = ()
    then: Callable[[Any], Iterable[Call]] = field(default=no_more)


class Workers:
    """An executor of concurrent.futures, for as long as the context is open.

    executor: any; it stays the caller's, who shuts it down. count: of its workers, as it knows.
    """

    name = "executor"
    lost: tuple[type[BaseException], ...] = (BrokenExecutor, CancelledError)  # of calls that died

    def __init__(self, executor: Executor, workers: int | None = None) -> None:
        self._executor = executor
        self._count = getattr(executor, "_max_workers", 1) if workers is None else workers

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def count(self) -> int:
        """Workers that are there now."""
        return self._count

    def run(self, calls: Iterable[Call]) -> None:
        """Make these calls and all that follow them. The first exception of one ends them all.

        ConnectionError when the workers are gone.
        """
        number = count()
        waiting = [(call.order, next(number), call) for call in calls]
        heapq.heapify(waiting)
        running: dict[Future, Call] = {}
        deaths = 0
        try:
            while waiting or running:
                while waiting and len(running) <= self.count:  # one more than there are workers
                    call = heapq.heappop(waiting)[2]
                    work = pickle.dumps((call.function, call.arguments))
                    running[self._submit(_checked, _here(), work)] = call
                done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                if not done:
                    self._require_workers()
                for future in done:
                    call = running.pop(future)
                    try:
                        result = future.result()
                    except self.lost as error:
                        deaths += 1
                        self._recover(error, deaths)
                        heapq.heappush(waiting, (call.order, next(number), call))
                        continue
                    deaths = 0
                    for more in call.then(result):
                        heapq.heappush(waiting, (more.order, next(number), more))
        except BaseException:
            for future in running:
                future.cancel()
            self._abandon()
            raise

    def close(self) -> None:
        """Let the workers go, where they are ours."""

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        return self._executor.submit(function, *arguments)

    def _require_workers(self) -> None:
        """ConnectionError when nobody is there who could finish a call."""

    def _recover(self, error: BaseException, deaths: int) -> None:
        """Make ready for calls that died with a worker; ConnectionError when that cannot be."""
        raise ConnectionError(f"{self.name}: a worker died and took the executor with it: {error}")

    def _abandon(self) -> None:
        """Stop what still runs, as nobody waits for it."""


class ProcessWorkers(Workers):
    """Processes of this machine, which share its CPUs. One that dies is replaced."""

    name = "processes"

    def __init__(self, workers: int | None = None) -> None:
        cpus = _C.get_num_threads()
        workers = cpus if workers is None else workers
        if workers < 1:
            raise ValueError(f"workers: expected at least 1, found {workers}")
        self._threads = max(1, cpus // workers)
        self._workers = workers
        super().__init__(self._pool(), workers)

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn"),
                                   _begin_process, (self._threads,))

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        try:
            return super()._submit(function, *arguments)
        except BrokenExecutor:  # it broke after the last look
            self._executor = self._pool()
            return super()._submit(function, *arguments)

    def _recover(self, error: BaseException, deaths: int) -> None:
        """A new pool: a dead process breaks the old one, and all calls of it end together."""
        if deaths > DEATHS * (self._workers + 1):
            raise ConnectionError(f"processes: workers died {DEATHS} times in a row (out of "
                                  f"memory, or killed): fewer workers need less memory") from error
        if isinstance(error, BrokenExecutor) and getattr(self._executor, "_broken", True):
            self._executor.shutdown(wait=False)
            self._executor = self._pool()

    def _abandon(self) -> None:
        processes = getattr(self._executor, "_processes", None) or {}
        for process in list(processes.values()):
            process.terminate()

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


class DaskWorkers(Workers):
    """The workers of a Dask scheduler, on any machines. Dask repeats what a dead one had.

    All must see model and output under the paths that this process does. Dask runs what a client
    sends: only a network that is trusted may reach the scheduler.
    """

    def __init__(self, scheduler: str) -> None:
        self.name = f"scheduler {scheduler}"
        try:
            from distributed import Client, KilledWorker
        except ImportError:
            raise ImportError("--executor dask needs dask.distributed "
                              "(pip install 'singlequant[distributed]')") from None
        try:
            self._client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise ConnectionError(f"{self.name}: no connection: {error}") from None
        self._killed, self.lost = KilledWorker, (*Workers.lost, KilledWorker)
        super().__init__(self._client.get_executor(pure=False))

    @property
    def count(self) -> int:
        """Calls that run at a time: Dask's threads."""
        return self._asked(lambda: max(1, sum(
            worker["nthreads"]
            for worker in self._client.scheduler_info(n_workers=-1)["workers"].values())))

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        return self._asked(super()._submit, function, *arguments)

    def _asked(self, ask: Callable[..., Any], *arguments: Any) -> Any:
        """What Dask answers. Once its client is closed, it answers with errors of many types."""
        try:
            return ask(*arguments)
        except Exception as error:
            if self._client.status == "running":
                raise
            raise self._lost() from error

    def _require_workers(self) -> None:
        if self._client.status != "running":
            raise self._lost()

    def _recover(self, error: BaseException, deaths: int) -> None:
        if isinstance(error, self._killed):  # Dask has tried again already
            raise ConnectionError(f"{self.name}: workers died one after the other over the same "
                                  f"call (out of memory, or killed): {error}") from None
        raise self._lost() from error

    def _lost(self) -> ConnectionError:
        return ConnectionError(f"{self.name}: the connection was lost")

    def close(self) -> None:
        self._client.close(timeout=POLL_SECONDS)


def open_workers(
    executor: str, workers: int | None = None, scheduler: str | None = None
) -> Workers:
    """Workers by the names that the command line has: "processes" of this machine, so many, or
    those of a "dask" scheduler. ValueError for others and for options that do not suit."""
    if executor not in EXECUTORS:
        raise ValueError(f"executor: expected one of {', '.join(EXECUTORS)}, found {executor!r}")
    if executor == "processes":
        if scheduler is not None:
            raise ValueError(f"scheduler: needs executor dask, found {scheduler} with processes")
        return ProcessWorkers(workers)
    if scheduler is None:
        raise ValueError("scheduler: executor dask needs the address of one, found none")
    if workers is not None:
        raise ValueError(f"workers: the scheduler says how many there are, found {workers}")
    return DaskWorkers(scheduler)


def _here() -> dict[str, str]:
    """What must be alike on all machines, for their results to be the same bytes."""
    return {"version": __version__, **kernel_names()}


def worker_name() -> str:
    """This process, for messages and for names that no other process chooses."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _checked(expected: dict[str, str], work: bytes) -> Any:
    """What a worker does with a call, pickled: what opens models at that must fail in the worker,
    not in an engine on the way. ValueError when it would round in another way."""
    found = _here()
    for key, value in expected.items():
        if found[key] != value:
            raise ValueError(f"worker {worker_name()}: {key}: expected {value}, found {found[key]}:"
                             f" all must round alike (SINGLEQUANT_DISABLE_CPU switches sets off)")
    function, arguments = pickle.loads(work)
    return function(*arguments)
