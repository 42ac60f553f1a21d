"""What the benchmarks share: timing, spread, the machine, types of options, JSON output."""

import argparse
import math
import os
import re
import subprocess
import sys
from pathlib import Path

from singlequant import _C, files
from singlequant.study.bench import interleave, summary

__all__ = ["ROOT", "add_output", "better_tables", "commit", "environment", "integers",
           "interleave", "machine_name", "print_environment", "seconds", "shape", "shown_arguments",
           "summary", "write_result"]

ROOT = Path(__file__).resolve().parent.parent
PATH_OPTIONS = ("--python", "--peer-python", "--work", "--folder", "--text", "--calibration",
                "--json")


# ---- options ------------------------------------------------------------------------------------


def integers(text, least=1):
    """A type for argparse, which names the option: "1,16" -> [1, 16], none below least."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise argparse.ArgumentTypeError(
            f"expected integers of at least {least} with commas between, found {text!r}")
    return found


def shape(text):
    """A type for argparse: "4096x1024", outputs and inputs, -> (4096, 1024)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected NxK, like 4096x4096, found {text!r}")
    return int(match[1]), int(match[2])


def seconds(text):
    """A type for argparse: a finite number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, found {text!r}")
    return found


def out_file(text):
    """A type for argparse: a file that can be written, refused before anything is measured."""
    try:
        files.check_file(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def add_output(parser, kind=None):
    """--json, and --keep where results of a kind are kept; `write_result` takes both."""
    parser.allow_abbrev = False  # `shown_arguments` knows whole names
    parser.add_argument("--json", type=out_file, metavar="FILE",
                        help="write figures and machine to this file")
    if kind is not None:
        parser.add_argument("--keep", action="store_true",
                            help=f"write them to results/MACHINE/DATE-{kind}.json")


def better_tables(table):
    """The kernel tables before this one, as SINGLEQUANT_DISABLE_CPU takes them: holds us to it."""
    compiled = _C.kernels()["compiled"]
    if table not in compiled:
        raise ValueError(f"--isa: expected one of {', '.join(compiled)}, found {table!r}")
    return ",".join(compiled[: compiled.index(table)])


# ---- the machine --------------------------------------------------------------------------------


def commit():
    """The checkout's commit, with a plus sign when files differ from it; None outside of one."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT,
            capture_output=True, text=True, check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def environment(argv=None):
    """What a reader needs to judge the figures. The load is the machine's before the run."""
    from singlequant.info import machine_info

    argv = sys.argv[1:] if argv is None else argv
    return {**machine_info(), "commit": commit(), "argv": shown_arguments(argv)}


def print_environment(values):
    kernels = values["kernels"]
    print(f"{values['cpu']}, {values['cpus']} CPUs, load {values['load']}")
    print(f"kernels {kernels['active']} (runnable: {', '.join(kernels['runnable'])}), "
          f"commit {values['commit']}, {values['blas']}")


def shown_arguments(argv):
    """A command's arguments without those that say where files of this machine are. Of a model's
    folder its name is left."""
    shown, skip = [], False
    for text in argv:
        name, equals, _ = text.partition("=")
        if not skip and name not in (*PATH_OPTIONS, "--keep"):
            shown.append(Path(text).name if text.startswith("/") else text)
        skip = not skip and name in PATH_OPTIONS and not equals
    return shown


def machine_name(values):
    """A folder's name for this machine: its CPU, its number of CPUs, its kernels beyond AVX2.

    Of all its CPUs, so that a run that was held to one lies beside the others.
    """
    runnable = values["kernels"]["runnable"]
    best = "-".join([t for t in reversed(runnable) if t not in ("generic", "avx2")] or runnable[:1])
    text = f"{values['cpu']}-{os.cpu_count()}cpu-{best}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# ---- results ------------------------------------------------------------------------------------


def write_result(result, path=None, kept_as=None):
    """Write a result with an environment as JSON, to path and, under a name, among those kept."""
    targets = [] if path is None else [Path(path)]
    if kept_as:
        values = result["environment"]
        folder = ROOT / "benchmarks" / "results" / machine_name(values)
        folder.mkdir(parents=True, exist_ok=True)
        targets.append(folder / f"{values['date']}-{kept_as}.json")
    for target in targets:
        files.write_file(target, files.json_text(result, indent=1) + "\n")
        print(f"written {target}")
