"""What the benchmarks share: interleaved timing, medians and spread, the machine, JSON output."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def interleave(functions, seconds=1.0, min_repeats=5, max_repeats=1000, clock=time.perf_counter):
    """Times functions (name -> callable without arguments) in turn, so that a slow moment of the
    machine meets all of them, in a new order each round, so that none always finds the caches as
    the same other left them. Returns name -> summary of its seconds. Each is called once
    beforehand. seconds is the aim for all of them together. clock: time.process_time leaves out
    what others took of the CPU, for functions of one thread."""
    order, shuffle = list(functions), np.random.default_rng(0).shuffle
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    begin = time.perf_counter()
    for repeat in range(max_repeats):
        if repeat >= min_repeats and time.perf_counter() - begin > seconds:
            break
        shuffle(order)
        for name in order:
            start = clock()
            functions[name]()
            times[name].append(clock() - start)
    return {name: summary(values) for name, values in times.items()}


def summary(values):
    low, median, high = np.percentile(values, [25, 50, 75])
    return {
        "median": float(median),
        "low": float(low),
        "high": float(high),
        "min": float(min(values)),
        "repeats": len(values),
    }


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


def environment():
    """What a reader needs to judge the figures. The load is the machine's before the run."""
    from singlequant.info import machine_info

    return {**machine_info(), "commit": commit(), "argv": sys.argv[1:]}


def print_environment(values):
    kernels = values["kernels"]
    print(f"{values['cpu']}, {values['cpus']} CPUs, load {values['load']}")
    print(f"kernels {kernels['active']} (runnable: {', '.join(kernels['runnable'])}), "
          f"commit {values['commit']}, {values['blas']}")


def write_json(path, rows, values):
    Path(path).write_text(json.dumps({"environment": values, "rows": rows}, indent=1) + "\n")
