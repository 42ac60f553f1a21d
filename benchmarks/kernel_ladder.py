"""Every kernel table on this machine, the newest instruction sets switched off one by one.

    python -m benchmarks.kernel_ladder [--seconds 60] [--shape 4096x4096] [--json FILE]

A process for each table, in which SINGLEQUANT_DISABLE_CPU names all better ones; passes over the
tables alternate. GOP/s is of quantizing the activations and multiplying, `bare` of multiplying
alone, beside the measured peak of the table's multiply step; up to 16 rows weights come from
memory. Then the share of rotating and quantizing in a linear, and one thread against all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from singlequant import _C
from singlequant.study.bench import (
    ROTATE_ROWS,
    ROWS,
    SHAPE,
    TransformedLinear,
    best_read,
    copies_beyond_cache,
    interleave,
    measure_peaks,
    real_cores,
    speed_row,
    table_peaks,
)

from . import common

SCHEMES = ("w4a4", "w4a8", "w4a16")
PASSES = 3
QUICK_SHAPE = (256, 512)


def median(dicts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Key by key."""
    return {key: float(np.median([d[key] for d in dicts])) for key in dicts[0]}


# ---- one table, in its process ------------------------------------------------------------------


def measure_table(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each scheme and m, of the transform, and of more threads, for the active table."""
    n, k = arguments.shape
    weight = np.random.default_rng(0).standard_normal((n, k), np.float32)
    copies = 2 if arguments.quick else copies_beyond_cache(n * k // 2)
    linears = {s: TransformedLinear(weight, s, 0, copies, rotated=False) for s in SCHEMES}
    part = arguments.seconds / 8
    _C.set_num_threads(1)
    parts = {f"{s} {m}": measure_parts(linears[s], m, part / len(SCHEMES) / len(arguments.m) * 4)
             for m in arguments.m for s in SCHEMES}
    read = best_read(linears["w4a4"].weights, part)
    x = np.random.default_rng(0).standard_normal((max(arguments.m), k), np.float32)
    found = {"table": _C.kernels()["active"], "parts": parts, "read_gbs": read["gbs"],
             "transform": {}, "threads": {}}
    slowest = max(sum(p.values()) for p in parts.values())
    if slowest < part or arguments.quick:  # else the table is no choice for so many rows
        found["transform"] = {s: TransformedLinear(weight, s).transform_share(x, part / 2)
                              for s in SCHEMES[:2]}
        found["threads"] = scaling(linears, x, arguments.threads, part)
    return found


def measure_parts(linear: TransformedLinear, m: int, seconds: float) -> dict[str, float]:
    """Median seconds of quantizing m rows and of multiplying them."""
    x = np.random.default_rng(m).standard_normal((m, linear.k), np.float32)
    weights = linear.weights if m <= ROTATE_ROWS else linear.weights[:1]
    found: list[tuple[float, float]] = []

    def call() -> None:
        weight = weights[len(found) % len(weights)]
        found.append(_C.measure_linear(x, weight, linear.bits, linear.clip))

    begin = time.perf_counter()
    while not found or time.perf_counter() - begin < seconds:
        call()
    quantize, multiply = np.median(found, axis=0)
    return {"quantize": float(quantize), "multiply": float(multiply)}


def scaling(
    linears: Mapping[str, TransformedLinear], x: np.ndarray, threads: int, seconds: float
) -> dict[str, float]:
    """Scheme -> how many times as fast as one thread `threads` are, at x's rows."""
    def call(scheme: str, count: int):
        def run() -> None:
            _C.set_num_threads(count)
            linears[scheme](x)

        return run

    if threads == 1:
        return {}
    calls = {f"{s} {c}": call(s, c) for s in SCHEMES for c in (1, threads)}
    times = interleave(calls, seconds, min_repeats=3)
    _C.set_num_threads(1)
    return {s: times[f"{s} 1"]["median"] / times[f"{s} {threads}"]["median"] for s in SCHEMES}


# ---- all tables ---------------------------------------------------------------------------------


def run_table(table: str, argv: Sequence[str]) -> dict[str, Any]:
    """`measure_table` of a fresh process that has this table as its best."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_ladder", "--child", *argv], check=True,
        capture_output=True, text=True,
        env={**os.environ, "SINGLEQUANT_DISABLE_CPU": common.better_tables(table)})
    found = json.loads(done.stdout)
    if found["table"] != table:
        raise RuntimeError(f"expected the table {table}, found {found['table']}")
    return found


def rows_of(
    passes: Sequence[Mapping[str, Any]], shape: tuple[int, int], bounds: Mapping[int, float | None]
) -> list[dict[str, Any]]:
    """A row for each scheme and m of one table."""
    n, k = shape
    read = float(np.median([p["read_gbs"] for p in passes]))
    rows = []
    for key in passes[0]["parts"]:
        scheme, m = key.split()
        t = median([p["parts"][key] for p in passes])
        whole = [sum(p["parts"][key].values()) for p in passes]
        seconds = {"median": float(np.median(whole)), "low": min(whole), "high": max(whole),
                   "repeats": len(whole)}
        bound = bounds[int(scheme.partition("a")[2])]
        row = speed_row(seconds, int(m), n, k, bound)
        row["bare_gops"] = 2e-9 * int(m) * n * k / t["multiply"]
        row["bare_share_of_peak"] = bound and row["bare_gops"] / bound
        if int(m) == 1:
            row["share_of_read"] = n * k / 2e9 / seconds["median"] / read
        rows.append({"table": passes[0]["table"], "scheme": scheme, **row})
    return rows


def ladder(arguments: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """All tables that run here, in the order of speed at the largest m."""
    environment = common.environment(argv)
    common.print_environment(environment)
    tables = environment["kernels"]["runnable"]
    peaks = measure_peaks(0.01 if arguments.quick else 0.1)
    found: dict[str, list] = {table: [] for table in tables}
    passes = 1 if arguments.quick else PASSES
    each = ["--seconds", str(arguments.seconds / len(tables) / passes)]
    for _ in range(passes):
        for table in tables:
            found[table].append(run_table(table, [*argv, *each]))
    rows, transforms, threads = [], [], []
    for table, own in found.items():
        rows += rows_of(own, arguments.shape, table_peaks(peaks, table))
        quick = [p for p in own if p["transform"]]
        for scheme in quick[0]["transform"] if quick else ():
            transforms.append({"table": table, "scheme": scheme, "m": max(arguments.m),
                               **median([p["transform"][scheme] for p in quick])})
        if quick and quick[0]["threads"]:
            threads.append({"table": table, "threads": arguments.threads, "m": max(arguments.m),
                            **median([p["threads"] for p in quick])})
    rows.sort(key=lambda row: (row["scheme"], row["m"], -row["gops"]))
    return {"what": "ladder", "environment": environment, "quick": arguments.quick,
            "shape": list(arguments.shape), "peaks": peaks,
            "cores": real_cores(0.02 if arguments.quick else 0.2),
            "rows": rows, "transform": transforms, "threads": threads}


def print_ladder(result: Mapping[str, Any]) -> None:
    print(f"\n{'scheme':<8}{'m':<6}{'table':<14}{'GOP/s':>8}{'bare':>8}  of the peak, of reading")
    for row in result["rows"]:
        peak, read = row["bare_share_of_peak"], row.get("share_of_read")
        print(f"{row['scheme']:<8}{row['m']:<6}{row['table']:<14}{row['gops']:8.1f}"
              f"{row['bare_gops']:8.1f}  {'-' if peak is None else f'{peak:.0%}':>5} "
              f"{'' if read is None else f'{read:.0%}':>6}")
    for row in result["transform"]:
        print(f"transform and quantization on {row['table']}: {row['share']:.1%} of "
              f"{row['scheme']} at m = {row['m']}")
    ratio = result["cores"]["ratio"]
    if ratio is not None:
        print(f"two CPUs do {ratio:.2f}x the integer work of one")
    for row in result["threads"]:
        print(f"{row['threads']} threads on {row['table']}: "
              + ", ".join(f"{s} {row[s]:.2f}x" for s in SCHEMES) + f" at m = {row['m']}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=common.seconds, default=60.0, metavar="S",
                   help="time to measure for, packing aside (default %(default)g)")
    p.add_argument("--shape", type=common.shape, default=SHAPE, metavar="NxK",
                   help=f"outputs and inputs (default {SHAPE[0]}x{SHAPE[1]})")
    p.add_argument("--m", type=common.integers, default=list(ROWS), metavar="A,B",
                   help="rows (default %(default)s)")
    p.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))),
                   metavar="N", help="to set beside one (default %(default)s)")
    p.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs")
    common.add_output(p, "ladder")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = p.parse_args(argv)
    cpus = len(os.sched_getaffinity(0))
    if not 1 <= arguments.threads <= cpus:
        p.error(f"argument --threads: expected 1 to {cpus}, the CPUs here, found "
                f"{arguments.threads}")
    if arguments.quick:
        arguments.shape, arguments.seconds = QUICK_SHAPE, min(arguments.seconds, 0.5)
    return arguments


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    if arguments.child:
        print(json.dumps(measure_table(arguments)))
        return
    result = ladder(arguments, argv)
    print_ladder(result)
    common.write_result(result, arguments.json, arguments.keep and "ladder")


if __name__ == "__main__":
    main(sys.argv[1:])
