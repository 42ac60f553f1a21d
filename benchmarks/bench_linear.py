"""Packed linears, activation quantization included, against OpenBLAS sgemm by threads and shape.

    python -m benchmarks.bench_linear [--quick] [--small] [--threads 1,2] [--json FILE]

Each number of threads runs in its own process, as numpy's OpenBLAS reads its number once. GOP/s
counts a multiply-add as two operations. `fp32 peak` is the best rate of sgemm seen in the process.
Each scheme multiplies its own copy of the weights, as no scheme may warm the caches for another: at
m = 1 the layers of a model come from memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from singlequant import _C

from . import common

LLAMA = [(4096, 4096), (11008, 4096), (4096, 11008)]
SMALL = [(512, 512), (1376, 512), (512, 1376)]
SCHEMES = {"W4A4": 4, "W4A8": 8, "W4A16": 16}


def bench_shape(n, k, m, seconds):
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (n, -(-k // 8))).astype(np.int32)
    scales = np.full(n, 0.01, np.float32)
    dense = _C.unpack(words, k) * np.float32(0.01)
    x = rng.standard_normal((m, k)).astype(np.float32)
    functions = {
        name: partial(_C.linear, x, _C.PackedWeight(words, scales, k), bits)
        for name, bits in SCHEMES.items()
    }
    functions["sgemm"] = lambda: x @ dense.T
    reference = functions["sgemm"]()
    error = np.abs(functions["W4A16"]() - reference).max() / np.abs(reference).max()
    assert error < 1e-4, f"W4A16 is not what it is compared to: {error}"
    return common.interleave(functions, seconds)


def bench_threads(arguments):
    """The rows of this process's number of threads; prints them as they come."""
    _C.set_num_threads(arguments.child)
    rows = []
    shapes = SMALL if arguments.small else LLAMA[:1] if arguments.quick else LLAMA
    print(f"\n{arguments.child} threads, {_C.kernels()['active']}: GOP/s (quartiles), "
          "times sgemm's speed")
    for n, k in shapes:
        for m in (1, 16, 512):
            times = bench_shape(n, k, m, 0.5 if arguments.quick else 3.0)
            text = f"n={n:<6}k={k:<6}m={m:<4}"
            for name, t in times.items():
                row = {"scheme": name, "threads": arguments.child, "n": n, "k": k, "m": m, **t}
                operations = 2e-9 * n * k * m
                row["gops"] = operations / t["median"]
                row["gops_low"], row["gops_high"] = operations / t["high"], operations / t["low"]
                row["speedup"] = times["sgemm"]["median"] / t["median"]
                rows.append(row)
                text += (f"  {name} {row['gops']:6.1f} ({row['gops_low']:.0f}-"
                         f"{row['gops_high']:.0f}) {row['speedup']:5.2f}x")
            print(text, flush=True)
    peak = max(2e-9 * r["n"] * r["k"] * r["m"] / r["min"] for r in rows if r["scheme"] == "sgemm")
    for row in rows:
        row["share_of_fp32_peak"] = row["gops"] / peak
    print(f"fp32 peak (best sgemm) {peak:.0f} GOP/s; best W4A4 "
          f"{max(r['gops'] for r in rows if r['scheme'] == 'W4A4') / peak:.2f} of it")
    Path(arguments.rows).write_text(json.dumps(rows))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, half a second each")
    parser.add_argument("--small", action="store_true", help="sizes of a small model")
    parser.add_argument("--threads", type=common.integers, default=[1, 2], metavar="A,B",
                        help="numbers of threads (default 1,2)")
    common.add_output(parser)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main():
    arguments = parse(sys.argv[1:])
    if arguments.child:
        bench_threads(arguments)
        return

    values = common.environment()
    common.print_environment(values)
    rows = []
    for threads in map(str, arguments.threads):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "benchmarks.bench_linear", *sys.argv[1:],
                       "--child", threads, "--rows", str(path)]
            subprocess.run(
                command, env={**os.environ, "OPENBLAS_NUM_THREADS": threads}, check=True
            )
            rows += json.loads(path.read_text())
    common.write_result({"environment": values, "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
