"""The driver's side of a benchmark's processes: starts a worker of peers/, asks, waits, ends it.

Each library has a process of its own, in the Python that has its packages. peers/serving.py is the
other side and says what the lines between them hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from . import common

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
                    "SINGLEQUANT_NUM_THREADS")


class Process:
    """A worker; answers are dicts, {"failed": why} among them.

    module: of benchmarks.peers, run with `-m` from the repository's root. threads: what libraries
    are told to use. environment: more variables. own: whether the worker needs this package and so
    this process's search path, which another Python must not see. paused: it stands still (SIGSTOP)
    between orders, so that its idle threads take nothing from the others. timeout: seconds that an
    answer may take.
    """

    def __init__(self, module: str, arguments: Sequence[object], *, python: str, threads: int,
                 environment: Mapping[str, str], own: bool, paused: bool, timeout: float) -> None:
        self.failed, self.paused, self.timeout = None, paused, timeout
        variables = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)), **environment}
        if not own and python != sys.executable:
            variables.pop("PYTHONPATH", None)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [os.path.abspath(shutil.which(python) or python), "-m", f"benchmarks.peers.{module}",
             *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=variables,
            cwd=common.ROOT)
        self.hello = self._answer()
        self.failed = self.hello.get("failed")
        self._pause()

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer to an order; {"failed": why} at once where the process failed before."""
        if self.failed is not None:
            return {"failed": self.failed}
        if self.paused:
            self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells
            self.process.stdin.write((json.dumps(order) + "\n").encode())
            self.process.stdin.flush()
        answer = self._answer()
        self._pause()
        return answer

    def said(self) -> str:
        """The end of what the process wrote to standard error."""
        self.errors.seek(0)
        return self.errors.read()[-3000:]

    def end(self) -> None:
        """Kill the process and close its pipes."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()

    def _answer(self) -> dict[str, Any]:
        ready, _, _ = select.select([self.process.stdout], [], [], self.timeout)
        line = self.process.stdout.readline() if ready else b""
        if line:
            return json.loads(line)
        if ready:
            self.failed = f"the process ended with status {self.process.wait()}"
        else:
            self.failed = f"no answer in {self.timeout:g} s"
        return {"failed": self.failed}

    def _pause(self) -> None:
        if self.paused and self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)
