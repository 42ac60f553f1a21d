"""Instructions of a packed linear, counted by callgrind, against the numbers kept here.

    python -m benchmarks.instructions [--update] [--tolerance 0.1]

Times of a shared machine say nothing about a change of a few percent; instructions do. Counted are
those inside `_C.linear` alone, on one thread, per call. A case that needs more than it did, by more
than the tolerance, fails; instructions.json holds a set of numbers for each compiler, and one that
it does not know is a visible skip. --update writes this compiler's numbers. valgrind has no
AVX-512, so the tables are the generic one and AVX2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from singlequant import _C, files

KEPT = Path(__file__).with_name("instructions.json")
TABLES = ("generic", "avx2")  # that valgrind can run
SCHEMES = {"w4a4": 4, "w4a8": 8}
ROWS = (1, 16)
SHAPE = (128, 512)
REPEATS = 4
MARK = "get_num_threads"  # the C function at which callgrind writes what it has counted


def compiler(library: Path) -> str:
    """Name and version of what compiled a library, as its .comment section has it."""
    data = library.read_bytes()
    for name, pattern in (("clang", rb"clang version (\d+\.\d+\.\d+)"),
                          ("gcc", rb"GCC: \([^)]*\) (\d+\.\d+\.\d+)")):
        found = re.search(pattern, data)
        if found:
            return f"{name} {found[1].decode()}"
    return "unknown"


def cases() -> list[str]:
    """Names of what is counted, in the order of the child."""
    runnable = [t for t in TABLES if t in _C.kernels()["runnable"]]
    return [f"{t} {s} m={m}" for t in runnable for s in SCHEMES for m in ROWS]


def run_cases(names: Sequence[str]) -> None:
    """Under callgrind: each case once for the first time, then a mark, REPEATS calls, a mark."""
    _C.set_num_threads(1)
    rng = np.random.default_rng(0)
    n, k = SHAPE
    words = _C.pack(rng.integers(-7, 8, (n, k)).astype(np.int8))
    scales = np.full(n, 0.01, np.float32)
    for name in names:
        table, scheme, rows = name.split()
        _C.use_kernels(table)
        weight = _C.PackedWeight(words, scales, k)
        x = rng.standard_normal((int(rows.partition("=")[2]), k)).astype(np.float32)
        _C.linear(x, weight, SCHEMES[scheme])
        _C.get_num_threads()
        for _ in range(REPEATS):
            _C.linear(x, weight, SCHEMES[scheme])
        _C.get_num_threads()


def count(names: Sequence[str]) -> dict[str, int]:
    """Case -> instructions of one call. RuntimeError when callgrind did not tell."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        done = subprocess.run(
            ["valgrind", "--tool=callgrind", "--toggle-collect=linear", f"--dump-before={MARK}",
             f"--callgrind-out-file={out}", sys.executable, "-m", "benchmarks.instructions",
             "--child", *names],
            capture_output=True, text=True,
            env={**os.environ, "SINGLEQUANT_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                 "PYTHONHASHSEED": "0"})
        dumps = sorted(Path(folder).glob("out.*"), key=lambda p: int(p.suffix[1:]))
        totals = [int(re.search(r"^totals: (\d+)", p.read_text(), re.M)[1]) for p in dumps]
    if done.returncode or len(totals) != 2 * len(names):
        raise RuntimeError(f"callgrind: expected {2 * len(names)} counts, found {len(totals)}: "
                           f"{done.stderr.strip()[-300:]}")
    return {name: totals[2 * i + 1] // REPEATS for i, name in enumerate(names)}


def compare(
    found: Mapping[str, int], kept: Mapping[str, int], tolerance: float
) -> list[str]:
    """A line for each case that needs more instructions than it did, or that is not kept."""
    problems = []
    for name, value in found.items():
        if name not in kept:
            problems.append(f"{name}: not in {KEPT.name}; --update writes it")
        elif value > kept[name] * (1 + tolerance):
            problems.append(f"{name}: {value} instructions, {value / kept[name] - 1:+.1%} of the "
                            f"{kept[name]} kept, more than {tolerance:+.0%}")
    return problems


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--update", action="store_true", help="keep what is counted now")
    p.add_argument("--tolerance", type=float, default=0.1, metavar="R",
                   help="share by which a case may grow (default %(default)g)")
    p.add_argument("--kept", type=Path, default=KEPT, metavar="FILE", help="(default %(default)s)")
    p.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = p.parse_args(argv)
    if arguments.child:
        run_cases(arguments.child)
        return 0
    if shutil.which("valgrind") is None:
        print("SKIPPED: valgrind is not installed")
        return 0
    known = json.loads(arguments.kept.read_text()) if arguments.kept.exists() else {}
    built = compiler(Path(_C.__file__))
    if built not in known and not arguments.update:
        print(f"SKIPPED: {arguments.kept.name} has no numbers of {built}, but of "
              f"{', '.join(known) or 'no compiler'}; --update writes them")
        return 0
    found = count(cases())
    kept = known.get(built, {})
    for name, value in found.items():
        change = f" ({value / kept[name] - 1:+.1%})" if name in kept else ""
        print(f"{name:<20} {value:>10}{change}")
    if arguments.update:
        known[built] = found
        files.write_file(arguments.kept, json.dumps(known, indent=1, sort_keys=True) + "\n")
        return 0
    problems = compare(found, kept, arguments.tolerance)
    for problem in problems:
        print(f"FAILED: {problem}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
