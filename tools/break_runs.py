#!/usr/bin/env python3
"""Kill or stop runs of quantize and compare, or fill the disk under them, and go on with them.

    python tools/break_runs.py kill [--points N] [--seed N]
    python tools/break_runs.py stop [--points N] [--seed N]
    python tools/break_runs.py full [--step N]

kill: every other point is a random time, the others are random calls that change the disk. Every
other run that goes on is killed as well. stop: SIGINT, SIGTERM or SIGHUP in place of SIGKILL, at a
random time after the command has begun to import its modules. full: every call that changes the
disk fails once, or every N-th one.

What must hold: no name of a result is ever there with other bytes than those of an undisturbed
run. A full disk is one line on standard error that names the file, with exit code 2. A signal is
one line with exit code 130 (SIGINT), 143 (SIGTERM) or 129 (SIGHUP). The same command with --resume
gives the bytes of the undisturbed run, and leaves nothing else. The calls are caught by
fail_calls.c, which is compiled here and preloaded. Needs gcc. Exit code 1 and a line for each point
where something else happened.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from singlequant import bundled_model
from singlequant.cli.main import main as singlequant
from singlequant.files import TEMPORARY

SHIM = Path(__file__).with_name("fail_calls.c")
ROUNDING = ["--calibration-tokens", "256"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
START_SECONDS = 0.5  # to import modules, about
MEMORY = "/dev/shm"  # a sync takes no time there; what a killed process wrote stays all the same
CLOCK = ("seconds", "peak_memory", "machine")  # what differs from run to run in rows of `compare`


class Command:
    """One command, which writes below a folder of its own."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.work, self.log = name, work / name, work / "log"
        self.out = self.work / "out"
        self.errors = work / "errors"
        self._start()
        code, self.error, self.calls, _ = self.run(0)
        assert code == 0, self.error
        self.expected = self.found()
        self._start()
        begun = time.perf_counter()
        self.run(None)
        self.seconds = time.perf_counter() - begun

    def arguments(self, resume: bool) -> list[str]:
        model, out = str(bundled_model()), str(self.out)
        if self.name == "quantize":
            return [self.name, model, out, *ROUNDING, "--method", "hadamard", "--weights", "rtn",
                    "--bits", "4", "--no-check", *(["--resume"] if resume else [])]
        return [self.name, model, *ROUNDING, "--methods", "none,hadamard", "--schemes", "w4a4",
                "--no-default", "--windows", "1", "--seq-len", "64", "--out", out,
                "--json", str(self.work / "rows.json")]

    def _start(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def run(self, at: int | None, how: str = "", resume: bool = False,
            seconds: float | None = None) -> tuple[int, str, int, str]:
        """(exit code or minus the signal, standard error, number and path of the last call).

        at: the call that fails, 0 for none, None without counting. seconds: killed after so many.
        """
        self.log.write_text("0 ")
        child = os.fork()
        if child == 0:
            self._be_child(at, how, resume)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        number, _, path = self.log.read_text().partition(" ")
        return code, self.errors.read_text(), int(number), path

    def _be_child(self, at: int | None, how: str, resume: bool) -> None:
        """Run the command, and end."""
        code = 70
        try:
            errors = os.open(self.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(errors, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if at is not None:
                os.environ |= {"FAIL_UNDER": f"{self.work}/", "FAIL_AT": str(at), "FAIL_HOW": how,
                               "FAIL_LOG": str(self.log)}
            code = singlequant(self.arguments(resume))
            sys.stdout.flush()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def found(self) -> dict[str, object]:
        """The results that are there: bytes by name, rows without what the clock says."""
        files = [path for path in self.work.rglob("*") if path.is_file()]
        names = {path.relative_to(self.work).as_posix(): path for path in files}
        return {name: path.read_bytes() if path.suffix not in (".json", ".jsonl")
                or self.name == "quantize" else self._without_clock(path)
                for name, path in names.items()}

    @staticmethod
    def _without_clock(path: Path) -> object:
        def strip(values: object) -> object:
            if isinstance(values, dict):
                return {k: strip(v) for k, v in values.items() if k not in CLOCK}
            return [strip(v) for v in values] if isinstance(values, list) else values

        if path.suffix == ".json":
            return strip(json.loads(path.read_text()))
        lines = path.read_text().split("\n")
        found = [strip(json.loads(line)) for line in lines[:-1]]
        return sorted(map(json.dumps, found))

    def wrong(self) -> str:
        """What is there under a result's name and should not be; "" if all is well."""
        for name, values in self.found().items():
            unfinished = ".partial" in name or name.endswith((TEMPORARY, ".jsonl"))
            if not unfinished and values != self.expected.get(name):
                return f"{name} is there with other bytes"
        return ""

    def goes_on(self, at: int = 0) -> str:
        """What is wrong when the run goes on; killed at a call first, where `at` is not 0."""
        if at and not self._is_done():
            self.run(at, "kill", resume=True)
            if problem := self.wrong():
                return f"killed again: {problem}"
        if not self._is_done():
            code, error, *_ = self.run(0, resume=True)
            if code != 0:
                return f"exit {code} when it goes on: {error.strip()}"
        found = self.found()
        names = found.keys() ^ self.expected.keys()
        names |= {name for name, values in found.items() if values != self.expected.get(name)}
        return f"not as undisturbed: {', '.join(sorted(names))}" if names else ""

    def _is_done(self) -> bool:
        """Whether quantize has nothing left to do: OUT has its name."""
        return self.name == "quantize" and self.out.exists()

    def killed(self, draw: random.Random, by_time: bool) -> str:
        """A run killed at a random time or call, and gone on with; what was wrong, or ""."""
        self._start()
        if by_time:
            seconds = draw.uniform(0, self.seconds)
            self.run(None, seconds=seconds)
            where = f"after {seconds:.3f} s"
        else:
            at = draw.randint(1, self.calls)
            where = f"at call {at}, {self.run(at, 'kill')[3]}"
        problem = self.wrong() or self.goes_on(draw.randint(1, self.calls) if draw.random() < 0.5
                                               else 0)
        return f"{self.name} killed {where}: {problem}" if problem else ""

    def stopped(self, draw: random.Random) -> str:
        """A run of its own process that a signal stops at a random time; what was wrong, or ""."""
        self._start()
        number = draw.choice(SIGNALS)
        with open(os.devnull, "wb") as nowhere:
            child = subprocess.Popen([sys.executable, "-m", "singlequant", *self.arguments(False)],
                                     stdout=nowhere, stderr=subprocess.PIPE, text=True,
                                     preexec_fn=usual_signals)
        while child.poll() is None and not catches_signals(child.pid):
            time.sleep(0.001)
        seconds = draw.uniform(0, 1.2 * (self.seconds + START_SECONDS))
        time.sleep(seconds)
        child.send_signal(number)
        error = child.communicate()[1]
        lines, code = error.strip().splitlines(), child.returncode
        problem = self.wrong()
        if not problem and code and (code != 128 + number or len(lines) != 1):
            problem = f"expected one line and exit {128 + number}, found {code}: {error!r}"
        problem = problem or self.goes_on()
        return f"{self.name}, {number.name} after {seconds:.3f} s: {problem}" if problem else ""

    def full(self, at: int) -> str:
        """A run whose call number `at` finds a full disk; what was wrong, or ""."""
        self._start()
        code, error, _, path = self.run(at)
        named = Path(path).name.removesuffix(TEMPORARY)
        lines = error.strip().splitlines()
        problem = self.wrong()
        if not problem and code == 0:
            problem = "the error passed unnoticed"
        if not problem and (code != 2 or len(lines) != 1 or "No space left" not in lines[0]
                            or named not in lines[0]):
            problem = f"expected one line that names {named} and exit 2, found {code}: {error!r}"
        problem = problem or self.goes_on()
        return f"{self.name}, disk full at call {at}, {path}: {problem}" if problem else ""


def usual_signals() -> None:
    """What a child starts with: this program may itself run with signals ignored."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def catches_signals(process: int) -> bool:
    """Whether a process has begun to handle signals as the command does.

    Python itself catches SIGINT from its first moments, but never SIGTERM.
    """
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)
    return False


@contextlib.contextmanager
def commands() -> Iterator[list[Command]]:
    """quantize and compare, run once undisturbed."""
    where = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="singlequant-break-", dir=where) as folder:
        yield [Command(name, Path(folder).resolve()) for name in ("quantize", "compare")]


def preload() -> None:
    """Start this program again with the calls caught, unless they are."""
    if "fail_calls" in os.environ.get("LD_PRELOAD", ""):
        return
    with tempfile.TemporaryDirectory(prefix="singlequant-calls-") as folder:
        shim = Path(folder) / "fail_calls.so"
        subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", shim,
                        SHIM, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(shim)}
        done = subprocess.run([sys.executable, *sys.argv], env=environment)
    sys.exit(done.returncode)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    for name, what in (("kill", "SIGKILL at random times and calls"),
                       ("stop", "SIGINT, SIGTERM and SIGHUP at random times")):
        mode = modes.add_parser(name, help=what)
        mode.add_argument("--points", type=int, default=200, metavar="N")
        mode.add_argument("--seed", type=int, default=0, metavar="N")
    full = modes.add_parser("full", help="ENOSPC at every call that changes the disk")
    full.add_argument("--step", type=int, default=1, metavar="N", help="every N-th call alone")
    arguments = parser.parse_args()
    preload()
    problems, points = [], 0
    with commands() as both:
        if arguments.mode != "full":
            draw = random.Random(arguments.seed)
            steps = [(c, i) for i in range(arguments.points // 2) for c in both]
            attempts = (c.killed(draw, i % 2 == 0) if arguments.mode == "kill" else c.stopped(draw)
                        for c, i in steps)
        else:
            attempts = (c.full(at) for c in both for at in range(1, c.calls + 1, arguments.step))
        for problem in attempts:
            points += 1
            if problem:
                problems.append(problem)
                print(problem, flush=True)
        calls = ", ".join(f"{c.name} makes {c.calls} calls" for c in both)
    print(f"{points} points, {len(problems)} wrong ({calls})")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
