# SPDX-License-Identifier: Apache-2.0
"""The command `compare`: methods x schemes side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import SCHEMES, WEIGHTS, QuantConfig
from ..methods.registry import METHODS
from .shared import (
    add_calibration,
    add_command,
    add_dequantize,
    add_table_bits,
    add_workers,
    integers,
    names,
    opened_workers,
    progress_bar,
    some_path,
    writing_part,
)

if TYPE_CHECKING:
    from ..study.compare import CompareOptions


def add(commands) -> None:
    """Add the command to the parser's."""
    defaults = QuantConfig()
    c = add_command(commands, "compare", run,
                     "Methods x schemes side by side: quality, seconds, memory, size.")
    c.add_argument("model", metavar="MODEL", type=some_path)
    c.add_argument("--methods", type=names, metavar="A,B",
                   help=f"among {', '.join(METHODS)} (default: all that need no extra)")
    c.add_argument("--schemes", type=names, metavar="A,B", default=["w4a8", "w4a4"],
                   help=f"among {', '.join(SCHEMES)} (default w4a8,w4a4)")
    c.add_argument("--weights", type=names, metavar="A,B", default=["rtn"],
                   help=f"rounding of every method, among {', '.join(WEIGHTS)} (default rtn)")
    c.add_argument("--clip", type=float, metavar="R", default=1.0,
                   help="share of a token's largest activation that every method's codes reach "
                        "(default %(default)g)")
    c.add_argument("--bits", type=float, metavar="B", default=4.0,
                   help="bits of every method's weights on average, 4 to 8 (default %(default)g)")
    c.add_argument("--group-size", type=int, metavar="G", default=0,
                   help="inputs that share a weight scale (default 0: the whole output channel)")
    add_table_bits(c)
    c.add_argument("--learned", type=some_path, metavar="FILE",
                   help="rotations of method spinquant, instead of learning them")
    c.add_argument("--no-default", action="store_true",
                   help="leave out the rows with the recipe's own rounding")
    c.add_argument("--text", type=some_path, metavar="FILE", nargs="+", action="extend",
                   help="texts to evaluate on (default: a bundled one)")
    c.add_argument("--seq-len", type=int, metavar="N",
                   help="tokens of a window (default: the model's maximum, 2048 at most)")
    c.add_argument("--windows", type=int, metavar="N",
                   help="evaluate on the first N windows of each text (default: all)")
    add_calibration(c)
    c.add_argument("--calibration-tokens", type=int, metavar="N",
                   help=f"default {defaults.calibration_tokens}")
    c.add_argument("--seeds", type=integers, metavar="N,M", default=[0],
                   help="draws of the calibration windows, a row each (default 0)")
    c.add_argument("--tasks", type=names, metavar="A,B", default=[],
                   help="zero-shot tasks of lm-evaluation-harness, paired with the original "
                        "question by question")
    c.add_argument("--task-folder", type=some_path, metavar="DIR", help="where local tasks are")
    c.add_argument("--out", type=some_path, metavar="DIR",
                   help="keep the packed models and the finished rows here; a rerun goes on")
    add_workers(c)
    add_dequantize(c)
    c.add_argument("--csv", type=some_path, metavar="FILE")
    c.add_argument("--json", type=some_path, metavar="FILE",
                   help="rows and machine; without --out, a rerun goes on from FILE.partial")
    c.add_argument("--picture", type=some_path, metavar="FILE", help="KL of each method as a dot")
    c.add_argument("--html", type=some_path, metavar="PAGE",
                   help="all of it as one web page, which needs no other file")


def options_from(arguments: argparse.Namespace, rows_file: Path | None) -> CompareOptions:
    """The comparison that the command line asks for."""
    from ..study.compare import CompareOptions

    same = ("methods", "schemes", "weights", "clip", "bits", "group_size", "seq_len",
            "windows", "calibration", "calibration_tokens", "seeds", "tasks", "task_folder", "out",
            "learned", "head_bits", "embedding_bits")
    return CompareOptions(**{name: getattr(arguments, name) for name in same},
                          texts=arguments.text, rows_file=rows_file,
                          defaults=not arguments.no_default)


def run(arguments: argparse.Namespace) -> None:
    """What the parsed command line asks for."""
    from ..checkpoint.folder import load_checkpoint
    from ..files import check_file, check_page, check_picture
    from ..study.compare import compare

    for path in (arguments.csv, arguments.json):
        if path is not None:
            check_file(path)
    if arguments.picture is not None:
        check_picture(arguments.picture)
    if arguments.html is not None:
        check_page(arguments.html)
    partial = None
    if arguments.json and not arguments.out:
        partial = arguments.json.with_name(arguments.json.name + ".partial")
    options = options_from(arguments, partial)
    model = load_checkpoint(arguments.model, arguments.dequantize)
    with opened_workers(arguments) as workers, progress_bar("comparing", "step") as update:
        result = compare(model, options, progress=update, writing=writing_part(update),
                         workers=workers)
    print(result)
    if arguments.csv:
        print(f"written     {result.to_csv(arguments.csv)}")
    if arguments.json:
        print(f"written     {result.to_json(arguments.json)}")
    if arguments.picture:
        result.plot(arguments.picture)
        print(f"written     {arguments.picture}")
    if arguments.html:
        print(f"written     {result.to_html(arguments.html)}")
    failed = [row for row in result.rows if row.error]
    if len(failed) == len(result.rows) - 1:
        raise ValueError(f"no method could run: {failed[0].error}")
    if failed and partial:
        print(f"kept        {partial}: a rerun tries again what failed")
    elif partial:
        partial.unlink()
