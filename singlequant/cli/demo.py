# SPDX-License-Identifier: Apache-2.0
"""The command `demo`: the whole thing on the bundled model."""

from __future__ import annotations

import argparse
from pathlib import Path

from .shared import add_command, some_path


def add(commands) -> None:
    """Add the command to the parser's."""
    c = add_command(commands, "demo", run,
                     "Quantize the bundled model in several ways, compare, draw, write a sentence.")
    c.add_argument("--picture", type=some_path, metavar="FILE",
                   default=Path("singlequant-demo.png"),
                   help="where the picture goes (default %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """What the parsed command line asks for."""
    from ..study.demo import demo

    demo(arguments.picture)
