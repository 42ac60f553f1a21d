# SPDX-License-Identifier: Apache-2.0
"""Signals that come while the command starts, before there is anything to go on with.

The package imports this first. Where it is imported as the command, SIGINT and SIGTERM end the
process by one line and the exit code that they have later, in cli/main.py. A program that imports
the package keeps its own handlers.
"""

from __future__ import annotations

import os
import signal
import sys

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


def is_command(arguments: list[str], original: list[str]) -> bool:
    """Whether this process is `singlequant` or `python -m singlequant`, by sys.argv and
    sys.orig_argv."""
    if arguments[:1] == ["-m"]:  # so it stands while the module is looked for
        return "singlequant" in original[: original.index("-m") + 2] if "-m" in original else False
    return os.path.basename(arguments[0] if arguments else "") == "singlequant"


def end(number: int, _: object = None) -> None:
    """End the process at once: nothing is open yet, or nothing any more."""
    os.write(2, f"singlequant: {WORDS[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)


def end_on_signals() -> None:
    """Let `end` handle what has its usual handler: a shell may have one ignored."""
    for number, usual in USUAL.items():
        if signal.getsignal(number) == usual:
            signal.signal(number, end)


if is_command(sys.argv, sys.orig_argv):
    end_on_signals()
