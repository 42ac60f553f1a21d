"""The worker's side of a benchmark's processes: one line of JSON in, one line out.

An order is {"do": NAME, ...}: the method NAME gets the other values and returns a dict. The first
line that a worker writes says what it is, or why it cannot run. A failure is {"failed": why}, and
{"missing": true} beside it where a package is not installed. This file needs no package at all.
"""

import ctypes
import json
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def attempt(function, *arguments, **options):
    """What the function returns, or {"failed": why}: a library may fail in any way."""
    try:
        return function(*arguments, **options)
    except BaseException as error:
        text = " ".join(str(error).split())
        found = {"failed": f"{type(error).__name__}: {text}"[:300]}
        return {**found, "missing": True} if isinstance(error, ImportError) else found


def serve(make, hello, cpus: str) -> None:
    """Run on these CPUs ("0,1"), make the worker, say hello(worker), answer orders until the end.

    Standard output is for answers alone: what a library prints there goes to standard error.
    The process ends with the one that started it, also while it is stopped.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(values: dict) -> None:
        print(json.dumps(values), file=answers, flush=True)

    worker = attempt(make)
    if isinstance(worker, dict):
        answer(worker)
        return
    answer(attempt(hello, worker))
    for line in sys.stdin:
        order = json.loads(line)
        answer(attempt(getattr(worker, order.pop("do")), **order))
