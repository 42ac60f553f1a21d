# SPDX-License-Identifier: Apache-2.0
"""The command `verify`: is a packed folder as it was written, and what it must be?"""

from __future__ import annotations

import argparse

from .shared import add_command, add_dequantize, progress_bar, some_path

EXIT_FAULTS = 1


def add(commands) -> None:
    """Add the command to the parser's."""
    c = add_command(commands, "verify", run,
                     "Check every hash and every number of a packed folder: a line for each fault, "
                     "and exit code 1 if there is one.")
    c.add_argument("out", metavar="OUT", type=some_path)
    c.add_argument("--source", type=some_path, metavar="MODEL",
                   help="also compare the model that OUT was made of with the hashes of what was "
                        "read")
    add_dequantize(c)


def run(arguments: argparse.Namespace) -> int:
    """What the parsed command line asks for; the exit code."""
    from ..checkpoint.folder import load_checkpoint
    from ..checkpoint.verify import verify_folder
    from ..sweep.measure import one_line

    source = None
    if arguments.source is not None:
        source = load_checkpoint(arguments.source, arguments.dequantize)
    with progress_bar("verifying", "layer") as update:
        faults = [one_line(fault) for fault in verify_folder(arguments.out, source, update)]
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{arguments.out}: as it was written, and sound")
    return EXIT_FAULTS if faults else 0
