# SPDX-License-Identifier: Apache-2.0
"""The command `push`: a packed folder to the Hub."""

from __future__ import annotations

import argparse

from .shared import add_command, progress_bar, some_path


def add(commands) -> None:
    """Add the command to the parser's."""
    c = add_command(commands, "push", run, "Upload a packed folder to the Hub.")
    c.add_argument("out", metavar="OUT", type=some_path)
    c.add_argument("repo_id", metavar="REPO_ID",
                   help="OWNER/NAME on the Hub; made if it is not there")
    c.add_argument("--private", action="store_true", help="make a private repository")
    c.add_argument("--message", metavar="TEXT", help="of the commit")
    c.add_argument("--dry-run", action="store_true",
                   help="check the folder and list the files, upload nothing")


def run(arguments: argparse.Namespace) -> None:
    """What the parsed command line asks for."""
    from ..export.card import CARD_FILE
    from ..integrations.hub import push_folder

    with progress_bar("checking", "layer") as update:
        pushed = push_folder(arguments.out, arguments.repo_id, private=arguments.private,
                             message=arguments.message, dry_run=arguments.dry_run, progress=update)
    total = sum(pushed.files.values())
    print(f"{arguments.out}: {len(pushed.files)} files, {total / 1e6:.1f} MB")
    for name, size in pushed.files.items():
        print(f"file        {name} ({size / 1e6:.3f} MB)")
    if pushed.left_out:
        print(f"left out    {', '.join(pushed.left_out)}: no files of a packed folder")
    if CARD_FILE not in pushed.files:
        print(f"hint        the folder has no {CARD_FILE}, the Hub's model card")
    if pushed.url is None:
        print(f"dry run     nothing was uploaded to {pushed.repo_id}")
    else:
        print(f"pushed      {pushed.url}")
