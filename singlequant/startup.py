# SPDX-License-Identifier: Apache-2.0
"""What the command needs before anything else: standard streams and handlers of signals.

The package imports this first. Where it is imported as the command, every standard stream can be
written to, and SIGINT, SIGTERM and SIGHUP end the process by one line and the exit code that they
have later, in cli/main.py. A program that imports the package keeps its own streams and handlers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
USUAL = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,  # nohup has it ignored
}


def is_command(arguments: list[str], original: list[str]) -> bool:
    """Whether this process is `singlequant` or `python -m singlequant`, by sys.argv and
    sys.orig_argv."""
    if arguments[:1] == ["-m"]:  # so it stands while the module is looked for
        return "singlequant" in original[: original.index("-m") + 2] if "-m" in original else False
    return os.path.basename(arguments[0] if arguments else "") == "singlequant"


def end(number: int, _: object = None) -> None:
    """End the process at once: nothing is open yet, or nothing any more."""
    with contextlib.suppress(OSError):  # a terminal that hung up
        os.write(2, f"singlequant: {WORDS[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)


def end_on_signals() -> None:
    """Let `end` handle what has its usual handler: a shell may have one ignored."""
    for number, usual in USUAL.items():
        if signal.getsignal(number) == usual:
            signal.signal(number, end)


def prepare_streams() -> None:
    """Let the null device stand for standard streams that are closed, as after `2>&-`, and escapes
    for characters that a stream cannot show.

    The next file that is opened would get the number of a closed one, and what is said to the user
    with it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number is free
        if getattr(sys, name) is None:
            null = open(os.devnull, "w" if number else "r")  # noqa: SIM115 - until the end
            setattr(sys, name, null)
        if number:
            getattr(sys, name).reconfigure(errors="backslashreplace")


if is_command(sys.argv, sys.orig_argv):
    prepare_streams()
    end_on_signals()
