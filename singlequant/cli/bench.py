# SPDX-License-Identifier: Apache-2.0
"""The command `bench`: the packed linears timed on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .shared import add_command


def add(commands) -> None:
    """Add the command to the parser's."""
    c = add_command(commands, "bench", run,
                     "Time the packed linears on this machine, against float32 and its peaks.")
    c.add_argument("--seconds", type=float, default=5.0, metavar="S",
                   help="time to measure for, besides some to prepare (default %(default)g)")
    c.add_argument("--json", type=Path, metavar="FILE", help="figures and machine")


def run(arguments: argparse.Namespace) -> None:
    """What the parsed command line asks for."""
    from .. import files
    from ..study import bench

    if arguments.json is not None:
        files.check_file(arguments.json)
    result = bench.bench(arguments.seconds)
    print(bench.report(result))
    if arguments.json is not None:
        files.write_file(arguments.json, json.dumps(result, indent=1) + "\n")
