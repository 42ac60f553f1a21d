# SPDX-License-Identifier: Apache-2.0
"""The command line: the commands, errors on one line, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .. import _C, startup
from ..checkpoint.tokenizer_errors import keep_panics_quiet
from ..info import __version__, show_runtime
from ..sweep.measure import one_line, reason
from . import (
    bench,
    compare,
    demo,
    evaluate,
    export,
    generate,
    inspect,
    push,
    quantize,
    verify,
)

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


class Stopped(BaseException):
    """SIGTERM or SIGHUP as an exception: what is finished stays, as after an interrupt."""

    number: int


class Terminated(Stopped):
    """By SIGTERM."""

    number = signal.SIGTERM


class Interrupted(KeyboardInterrupt):
    """By SIGINT. Python ends by the signal, whatever the exit code is, where a KeyboardInterrupt
    itself left a text that exec() ran (cpython, run_eval_code_obj): a subclass is left alone."""


class HungUp(Stopped):
    """By SIGHUP: the terminal was closed."""

    number = signal.SIGHUP


# In the order of --help.
COMMANDS = (quantize, evaluate, compare, generate, inspect, verify, export, push, demo, bench)
EXIT_BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """A parser, the commands' as well, whose messages repeat no more of an argument than others."""

    def error(self, message: str) -> NoReturn:
        """Usage, one line, and exit code 2."""
        super().error(one_line(message))

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Help and version as other output: argparse's own goes on where they cannot be written."""
        if file is sys.stdout:
            print(message, end="", flush=True)
        else:
            super()._print_message(message, file)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(
        prog="singlequant",
        description="Run large language models in 4 bits on the CPU.",
    )
    top.add_argument("--version", action="version", version=f"singlequant {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    runtime = commands.add_parser("runtime", help="what the kernels run on; for bug reports")
    runtime.set_defaults(run=run_runtime)
    return top


def run_runtime(arguments: argparse.Namespace) -> None:
    """Print the kernels, the libraries and the machine."""
    show_runtime()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code, or 2 and one line on standard error when the input is at fault.
    """
    parsed = argparse.Namespace()
    lost, quiet = _C.exit_when_lost(EXIT_BAD_INPUT), keep_panics_quiet(True)
    try:
        parsed = parser().parse_args(arguments)
        if getattr(parsed, "threads", None) is not None:
            set_threads(parsed.threads)
        with warnings.catch_warnings(), stoppable():
            warnings.showwarning = show_warning
            code = parsed.run(parsed)
            sys.stdout.flush()
    except (KeyboardInterrupt, Stopped) as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        how = f": {one_line(str(error))}" if str(error) else ""  # how to go on
        say(f"{startup.WORDS[signal.Signals(number)]}{how}")
        return 128 + number
    except BrokenPipeError:  # the reader of our output left
        return 0
    except (ValueError, OSError, MemoryError, ImportError, OverflowError) as error:
        say(describe(error, getattr(parsed, "out", None)))
        return EXIT_BAD_INPUT
    finally:
        drop_output()
        _C.exit_when_lost(lost)
        keep_panics_quiet(quiet)
    return code or 0


def drop_output() -> None:
    """Nothing to write is left at the end of the process, where Python would fail by its own
    lines: what cannot be written is lost."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM raises `Terminated`, SIGHUP `HungUp` and SIGINT `Interrupted`, where this is the
    main thread: others have no signals. A SIGINT that a shell has ignored stays so, and a SIGHUP
    of nohup. Where this is the command, one more signal, amid what the first one set off, ends the
    process at once."""

    def stop(number: int, _: object) -> None:
        for other, handler in before.items():
            if handler is startup.end:
                signal.signal(other, handler)
        stopped = (kind for kind in (Terminated, HungUp) if kind.number == number)
        raise next(stopped, Interrupted)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGINT) is startup.end:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    if signal.getsignal(signal.SIGHUP) in (signal.SIG_DFL, startup.end):
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is startup.end:  # the process ends by itself now, and by its own code
                handler = signal.SIG_IGN
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def set_threads(count: int) -> None:
    """Use so many threads. ValueError names a number that cannot be."""
    try:
        _C.set_num_threads(count)
    except OverflowError:  # beyond 64 bits
        raise ValueError(f"num_threads: expected a number of threads, got {count!s:.80}") from None


def show_warning(message: Warning | str, *_: object) -> None:
    """A warning as one line on standard error."""
    say(f"warning: {one_line(str(message))}")


def say(line: str) -> None:
    """A line on standard error. Nothing else changes where it cannot be written, as when its reader
    left: work goes on, and the exit code stays."""
    try:
        print(f"singlequant: {line}", file=sys.stderr)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def describe(error: BaseException, out: Path | None = None) -> str:
    """One line that names the thing. A file in OUT.partial is named from there on: who gave OUT
    knows the folders before it, and the advice behind the name is not cut."""
    if isinstance(error, OSError) and error.filename is None and error.errno == errno.ENOSPC:
        return f"standard output: {error.strerror}"  # every other file is named
    if not isinstance(error, OSError) or error.filename is None:
        return reason(error)
    line, partial = f"{error.filename}: {error.strerror}", f"{out}.partial"
    if out is not None and line.startswith(f"{partial}/"):
        line = line.replace(partial, f"{out.name}.partial")
    return one_line(line)
