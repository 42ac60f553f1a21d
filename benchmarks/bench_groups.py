# SPDX-License-Identifier: Apache-2.0
"""What a scale for every few inputs costs a packed linear, beside one scale per output.

    python -m benchmarks.bench_groups [--groups 128,64,32] [--shapes 4096x4096,...] [--json FILE]

One thread, every kernel table of this machine. The calls of one table, shape and scheme take turns.
Times are of multiplying alone. `x` is a group's median time over that of one scale per output.
"""

import argparse
import sys
import time

import numpy as np

from singlequant import _C

from . import common

SHAPES = "4096x4096,576x1536,1536x576"
SCHEMES = {"W4A8": 8, "W4A4": 4}


def measure(shape, bits, groups, rows, seconds):
    """Group (0: one scale per output) -> `common.summary` of the seconds, for the active table."""
    n, k = shape
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (n, -(-k // 8))).astype(np.int32)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    weights = {g: _C.PackedWeight(words, np.full((n, k // g if g else 1), 0.01, np.float32), k, g)
               for g in (0, *groups) if not g or k % g == 0}
    times = {g: [] for g in weights}
    begin = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - begin < seconds:
        for g, weight in weights.items():
            times[g].append(_C.measure_linear(x, weight, bits, 1.0)[1])
    return {g: common.summary(values) for g, values in times.items()}


def measure_table(table, arguments):
    """The rows of one table; prints them as they come."""
    _C.use_kernels(table)
    rows = []
    for shape in arguments.shapes:
        for scheme, bits in SCHEMES.items():
            found = measure(shape, bits, arguments.groups, arguments.m, arguments.seconds)
            operations = 2e-9 * arguments.m * shape[0] * shape[1]
            text = f"{table:<11} {shape[0]:>5} x {shape[1]:<5} {scheme}"
            for g, t in found.items():
                row = {"table": table, "n": shape[0], "k": shape[1], "m": arguments.m,
                       "scheme": scheme, "group": g, "gops": operations / t["median"],
                       "times": t["median"] / found[0]["median"], **t}
                rows.append(row)
                text += f"  g{g} {row['times']:.2f}x" if g else f"  {row['gops']:5.0f} GOP/s"
            print(text, flush=True)
    return rows


def shapes(text):
    """A type for argparse: "64x64,128x64"."""
    return [common.shape(part) for part in text.split(",")]


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=common.integers, default=[128, 64, 32], metavar="A,B",
                        help="inputs that share a scale, multiples of 32 (default 128,64,32)")
    parser.add_argument("--shapes", type=shapes, default=shapes(SHAPES), metavar="NxK,NxK",
                        help=f"outputs and inputs (default {SHAPES})")
    parser.add_argument("--m", type=int, default=512, help="tokens (default %(default)s)")
    parser.add_argument("--seconds", type=common.seconds, default=3.0,
                        help="for each table, shape and scheme (default %(default)g)")
    common.add_output(parser)
    arguments = parser.parse_args(argv)
    if bad := [g for g in arguments.groups if g % 32]:
        parser.error(f"argument --groups: expected multiples of 32, found {bad[0]}")
    if arguments.m < 1:
        parser.error(f"argument --m: expected at least 1, found {arguments.m}")
    return arguments


def main(argv):
    arguments = parse(argv)
    values = common.environment(argv)
    common.print_environment(values)
    _C.set_num_threads(1)
    tables = [t for t in _C.kernels()["runnable"] if t != "generic"] or ["generic"]
    rows = [row for table in tables for row in measure_table(table, arguments)]
    common.write_result({"environment": values, "rows": rows}, arguments.json)


if __name__ == "__main__":
    main(sys.argv[1:])
