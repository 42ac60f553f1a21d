# SPDX-License-Identifier: Apache-2.0
"""What several commands share: options, lists in options, the progress bar."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator

from ..config import KV_BITS


def add_command(commands, name: str, run: Callable, help_text: str) -> argparse.ArgumentParser:
    """A command with the options that every one has; `run` is called with what was parsed."""
    command = commands.add_parser(name, help=help_text, description=help_text)
    command.add_argument("--threads", type=int, metavar="N", help="default: one per CPU")
    command.set_defaults(run=run)
    return command


def add_kv_bits(command: argparse.ArgumentParser) -> None:
    """The option --kv-bits of commands that run a model."""
    command.add_argument("--kv-bits", type=int, choices=(*KV_BITS, 32),
                         help="bits of cached keys and values (default: the folder's, 32 if it is "
                              "not quantized)")


def names(text: str) -> list[str]:
    """The parts of 'a,b'."""
    return [part.strip() for part in text.split(",") if part.strip()]


def integers(text: str) -> list[int]:
    """The numbers of '0,1'."""
    return [int(part) for part in names(text)]


@contextlib.contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress callback (done, total) that draws a bar with the time left on standard error."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, leave=False, disable=None) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
