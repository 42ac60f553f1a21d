# SPDX-License-Identifier: Apache-2.0
"""The float32 product that others are measured against, in a process of its own.

The threads of a BLAS go on spinning for a while when a product is done. In the same process, or
beside it, they would take the CPUs from what is timed next. So the child answers only once it is
idle. This file is two things: a module for the parent, and what the child runs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from .. import _C

IDLE_STEP, IDLE_SHARE, IDLE_WAIT = 0.005, 0.1, 1.0  # seconds; CPU time of a step; seconds at most
IDLE_STEPS = 4  # in a row: a thread that waits for a CPU looks idle in one


class Float32Product:
    """x [m, k] times weights [n, k] transposed, in a child; a context manager that ends it.

    copies: of the weights, which calls walk round. OpenBLAS does the product on this process's
    number of threads. At m = 1 it is NumPy's of matrix and vector (sgemv, four times as fast there
    as sgemm), whose threads are those that OPENBLAS_NUM_THREADS gives it.
    """

    def __init__(self, n: int, k: int, copies: int) -> None:
        package = Path(__file__).resolve().parents[2]
        variables = os.environ | {
            "SINGLEQUANT_NUM_THREADS": str(_C.get_num_threads()),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(package), *sys.path]))}
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(n), str(k), str(copies)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)

    def __enter__(self) -> Float32Product:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._child.stdin.close()  # it ends at the end of its input
        self._child.stdout.close()
        self._child.wait()

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._child.pid

    def seconds(self, m: int) -> float:
        """What a product of m rows took. The child is idle before and after it."""
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells
            self._child.stdin.write(f"{m}\n")
            self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError(f"float32: its process ended with status {self._child.wait()}")
        return float(answer)


def wait_until_idle() -> None:
    """Return once the threads of this process take next to no CPU time."""
    end, idle = time.monotonic() + IDLE_WAIT, 0
    while time.monotonic() < end and idle < IDLE_STEPS:
        before = time.process_time()
        time.sleep(IDLE_STEP)
        idle = idle + 1 if time.process_time() - before < IDLE_SHARE * IDLE_STEP else 0


def serve(n: int, k: int, copies: int) -> None:
    """The child: a line with m in, a line with seconds out."""
    weight = np.random.default_rng(0).standard_normal((n, k), np.float32)
    turn = itertools.cycle([weight, *(weight.copy() for _ in range(copies - 1))])
    for line in sys.stdin:
        m = int(line)
        x = np.random.default_rng(m).standard_normal((m, k), np.float32)
        w = next(turn)
        begin = time.perf_counter()
        y = w @ x[0] if m == 1 else _C.linear_dense(x, w)
        taken = time.perf_counter() - begin
        del y
        wait_until_idle()
        print(taken, flush=True)


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
