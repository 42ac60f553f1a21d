# SPDX-License-Identifier: Apache-2.0
"""How fast packed linears are on this machine: against float32, and against what it can do at most.

Everything is timed interleaved in one run, transform and quantization of the activations included.
The benchmarks of the repository build on the same pieces.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..config import DEFAULT_CLIP, INT8_STEP, SCHEMES
from ..info import machine_info, own_cpus
from ..methods.balanced import INT8_SHARE
from .float32 import Float32Product

__all__ = [
    "TransformedLinear",
    "advice",
    "bench",
    "best_read",
    "copies_beyond_cache",
    "interleave",
    "last_level_bytes",
    "measure_peaks",
    "real_cores",
    "report",
    "speed_row",
    "summary",
    "table_peaks",
]

SHAPE = (4096, 4096)  # outputs and inputs of LLaMA-2-7B's o_proj
ROWS = (1, 16, 512)  # a decoded token, a small batch, a prompt
ROTATE_ROWS = 16  # up to so many rows, weights come from memory, as a model's layers do
MEMORY_BYTES_MAX = 1 << 30  # of one linear's copies
READ_VARIANTS = tuple((ahead, streams) for ahead in (0, 512, 2048, 8192) for streams in (1, 2, 4))
FLOAT32 = "float32"
CORE_REPEATS = 7  # of one CPU alone and two together


# ---- timing -------------------------------------------------------------------------------------


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    seconds: float = 1.0,
    min_repeats: int = 5,
    max_repeats: int = 1000,
    clock: Callable[[], float] = time.perf_counter,
    elsewhere: Mapping[str, Callable[[], float]] | None = None,
) -> dict[str, dict[str, float]]:
    """Time functions (name -> callable without arguments) in turn; name -> `summary` in seconds.

    In turn, so that a slow moment of the machine meets all of them; in a new order each round, so
    that none always finds the caches as the same other left them. Each is called once beforehand.
    seconds is the aim for all of them together. clock: time.process_time leaves out what others
    took of the CPU, for functions of one thread. elsewhere: more of them, which return what they
    took, as another process measured it.
    """
    def timed(function: Callable[[], Any]) -> float:
        start = clock()
        function()
        return clock() - start

    calls = {name: partial(timed, function) for name, function in functions.items()}
    calls |= elsewhere or {}
    order, shuffle = list(calls), np.random.default_rng(0).shuffle
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for repeat in range(max_repeats):
        if repeat >= min_repeats and time.perf_counter() - begin > seconds:
            break
        shuffle(order)
        for name in order:
            times[name].append(calls[name]())
    return {name: summary(values) for name, values in times.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles (low, high), min and the number of repeats."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {
        "median": float(median),
        "low": float(low),
        "high": float(high),
        "min": float(min(values)),
        "repeats": len(values),
    }


# ---- what the machine can do --------------------------------------------------------------------


def measure_peaks(seconds: float = 0.05) -> dict[str, float]:
    """10^9 operations per second of one thread, for each multiply step that runs here."""
    return {step: _C.measure_peak(step, seconds) / 1e9 for step in _C.peak_steps()}


def table_peaks(peaks: Mapping[str, float], table: str) -> dict[int, float | None]:
    """Peak of a kernel table by the activations' bits; None where the compiler chose the step."""
    steps = _C.kernels()["steps"][table]
    return {bits: None if step is None else peaks[step] for bits, step in steps.items()}


def real_cores(seconds: float = 0.5) -> dict[str, Any]:
    """Whether two CPUs are two cores: a loop of integer arithmetic on both at once and on one.

    {"cpus": the two, "ratio": together over alone}, 2 for two cores and near 1 for one that two
    CPUs share; ratio None where this process has one CPU. Alone and together take turns, and the
    ratio is of their medians: another's moment on a CPU moves one of them only. seconds: for all.
    """
    cpus = own_cpus()[:2]
    if len(cpus) < 2:
        return {"cpus": cpus, "ratio": None}
    step = "int64 multiply-add"
    rates = dict.fromkeys(cpus, 0.0)

    def measure(cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})  # of this thread
        rates[cpu] = _C.measure_peak(step, seconds / (2 * CORE_REPEATS))

    def run(chosen: Sequence[int]) -> float:
        threads = [threading.Thread(target=measure, args=(cpu,)) for cpu in chosen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(rates[cpu] for cpu in chosen)

    pairs = [(run(cpus[:1]), run(cpus)) for _ in range(CORE_REPEATS)]
    alone, together = np.median(pairs, axis=0)
    return {"cpus": cpus, "ratio": float(together / alone)}


def last_level_bytes() -> int:
    """Bytes of the largest cache that Linux names; 64 MB where it names none."""
    found = [1 << 26]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 30))
    return max(found[1:] or found)


def copies_beyond_cache(copy_bytes: int) -> int:
    """Copies that together are four times the last cache (at most 1 GB), at least 2."""
    wanted = min(4 * last_level_bytes(), MEMORY_BYTES_MAX)
    return max(2, -(-wanted // copy_bytes))


def best_read(
    sources: Sequence[Any], seconds: float = 0.5, variants: Sequence = READ_VARIANTS
) -> dict[str, Any]:
    """The fastest way to read each of sources (packed weights, uint8 arrays), one after the other.

    {"gbs": 10^9 bytes per second by the best variant's median, "prefetch", "streams", "bytes"}.
    """
    sources = list(sources)
    turn = itertools.cycle(sources)  # one for all variants: each finds its source out of the cache

    def read(variant: tuple[int, int]) -> Callable[[], Any]:
        return lambda: _C.read_loop(next(turn), *variant)

    times = interleave({str(v): read(v) for v in variants}, seconds)
    best = min(variants, key=lambda v: times[str(v)]["median"])
    size = sum(s.nbytes for s in sources)
    return {"gbs": size / len(sources) / times[str(best)]["median"] / 1e9, "prefetch": best[0],
            "streams": best[1], "bytes": size}


# ---- what is timed ------------------------------------------------------------------------------


class TransformedLinear:
    """A packed linear as a model runs it: float activations are rotated, quantized, multiplied.

    The rotation is a dense Kronecker product of random orthogonal factors, as large as the solved
    ones, folded into the weights; scheme is one of SCHEMES. int8_inputs: leading inputs at 8 bits
    under w4a4 (default: as many as the default method keeps). copies: packings of the same weights
    that calls walk round, so that each finds its weights in memory instead of the cache.
    """

    def __init__(
        self,
        weight: NDArray[np.float32],
        scheme: str,
        int8_inputs: int | None = None,
        copies: int = 1,
        rotated: bool = True,
    ) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, found {scheme!r}")
        self.n, self.k = weight.shape
        self.bits, self.clip = SCHEMES[scheme], DEFAULT_CLIP[scheme]
        k1, k2 = _C.factor_sizes(self.k)
        self.rotation = None
        if rotated:
            self.rotation = _C.Rotation(self.k, *(_C.random_orthogonal(order, seed)
                                                  for seed, order in enumerate((k1, k2))))
            weight = _C.rotate(weight, self.rotation)
        if int8_inputs is None:
            int8_inputs = recipe_int8_inputs(k1, k2) if self.bits == 4 and rotated else 0
        codes, scales, _ = _C.quantize(weight)
        words = _C.pack(codes)
        self.weights = [_C.PackedWeight(words, scales, self.k, 0, int8_inputs)
                        for _ in range(copies)]
        self.turn = 0

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """y [m, n] of x [m, k], by the next copy."""
        self.turn = (self.turn + 1) % len(self.weights)
        return _C.linear(x, self.weights[self.turn], self.bits, self.clip, self.rotation)

    def transform_share(self, x: NDArray[np.float32], seconds: float = 0.3) -> dict[str, float]:
        """Median seconds of rotating and quantizing x, and of multiplying; the first's share."""
        parts: list[tuple[float, float]] = []
        begin = time.perf_counter()
        while len(parts) < 3 or time.perf_counter() - begin < seconds:
            parts.append(_C.measure_linear(x, self.weights[0], self.bits, self.clip, self.rotation))
        prepare, multiply = (float(v) for v in np.median(parts, axis=0))
        return {"prepare": prepare, "multiply": multiply, "share": prepare / (prepare + multiply)}


def recipe_int8_inputs(k1: int, k2: int) -> int:
    """Leading inputs that the default method keeps at 8 bits under w4a4: whole rows of k2."""
    rows = round(INT8_SHARE * k1)
    return rows * k2 if k2 % INT8_STEP == 0 and 2 * rows <= k1 else 0


# ---- the short benchmark ------------------------------------------------------------------------


def bench(
    seconds: float = 5.0,
    shape: tuple[int, int] = SHAPE,
    rows: Sequence[int] = ROWS,
    schemes: Sequence[str] = tuple(SCHEMES),
) -> dict[str, Any]:
    """Time every scheme and float32 on one linear [n, k] = shape, on the threads of the pool.

    A dict for JSON: environment, shape, peaks, cores, read, rows (one per m and scheme: gops,
    quartiles, speedup over float32, share of the peak) and transform. seconds: the aim for all
    timing. float32 is OpenBLAS on weights of its own, in a process of its own (Float32Product).
    ValueError for seconds that are not finite and above 0.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds: expected a finite number above 0, found {seconds:g}")
    n, k = shape
    environment = machine_info()
    threads = _C.get_num_threads()
    table = environment["kernels"]["active"]
    peaks = measure_peaks(min(0.05, seconds / 100))
    bounds = table_peaks(peaks, table)
    weight = np.random.default_rng(0).standard_normal((n, k), np.float32)
    copies = copies_beyond_cache(n * k // 2)
    linears = {s: TransformedLinear(weight, s, copies=copies) for s in schemes}
    read = best_read(next(iter(linears.values())).weights, seconds / 10)
    all_times = {}
    with Float32Product(n, k, copies_beyond_cache(weight.nbytes)) as dense:
        for m in rows:
            x = np.random.default_rng(m).standard_normal((m, k), np.float32)
            calls = {name: partial(linear, x) for name, linear in linears.items()}
            all_times[m] = interleave(calls, 0.7 * seconds / len(rows), min_repeats=3,
                                      elsewhere={FLOAT32: partial(dense.seconds, m)})
    found: list[dict[str, Any]] = []
    for m, times in all_times.items():
        for name, t in times.items():
            bits = SCHEMES.get(name)
            peak = bounds.get(bits) if bits else None
            row = speed_row(t, m, n, k, None if peak is None else peak * threads)
            speedup = times[FLOAT32]["median"] / t["median"]
            if bits and m == 1:
                row["share_of_read"] = n * k / 2e9 / t["median"] / read["gbs"]
            found.append({"scheme": name, **row, "speedup": speedup})
    first = next(iter(linears))
    x = np.random.default_rng(0).standard_normal((max(rows), k), np.float32)
    return {
        "environment": environment,
        "shape": [n, k],
        "peaks": peaks,
        "cores": real_cores(min(0.1, seconds / 50)),
        "read": read,
        "rows": found,
        "transform": {"scheme": first, "m": max(rows),
                      **linears[first].transform_share(x, seconds / 10)},
    }


def speed_row(
    seconds: Mapping[str, float], m: int, n: int, k: int, peak: float | None
) -> dict[str, Any]:
    """GOP/s with quartiles of [m, k] times [n, k] transposed, and the share of peak GOP/s."""
    operations = 2e-9 * m * n * k
    gops = operations / seconds["median"]
    return {"m": m, "n": n, "k": k, "seconds": seconds["median"], "gops": gops,
            "gops_low": operations / seconds["high"], "gops_high": operations / seconds["low"],
            "repeats": seconds["repeats"], "share_of_peak": peak and gops / peak}


def report(result: Mapping[str, Any]) -> str:
    """What `bench` found, for a terminal."""
    environment, kernels = result["environment"], result["environment"]["kernels"]
    steps = kernels["steps"][kernels["active"]]
    n, k = result["shape"]
    usable = [table for table in kernels["runnable"] if table not in kernels["disabled"]]
    lines = [
        f"{environment['cpu']}, {environment['threads']} of {environment['cpus']} CPUs, "
        f"load {environment['load'][0]}",
        f"kernels: {kernels['active']}, the best of those that run here "
        f"({', '.join(usable)}) of the compiled ({', '.join(kernels['compiled'])})",
    ]
    if kernels["disabled"]:
        lines.append("switched off through SINGLEQUANT_DISABLE_CPU: "
                     + ", ".join(kernels["disabled"]))
    if result["cores"]["ratio"] is not None:
        lines.append(f"cores: two CPUs do {result['cores']['ratio']:.2f}x the work of one")
    lines.append("")
    lines.append("peaks, one thread: " + ", ".join(
        f"{step} {rate:.0f} GOP/s" for step, rate in result["peaks"].items()
        if step in steps.values()) + f"; reading {result['read']['gbs']:.1f} GB/s")
    lines.append(f"\n{n} x {k} linear, rotating and quantizing the activations included\n")
    lines.append(f"{'scheme':<9}{'m':<5}{'GOP/s':>8}  {'quartiles':<17}{'float32':>8}{'peak':>7}"
                 f"{'reading':>9}")
    schemes = list(dict.fromkeys(row["scheme"] for row in result["rows"]))
    for row in sorted(result["rows"], key=lambda row: (schemes.index(row["scheme"]), row["m"])):
        quartiles = f"{row['gops_low']:.1f} to {row['gops_high']:.1f}"
        peak, read = row["share_of_peak"], row.get("share_of_read")
        lines.append(f"{row['scheme']:<9}{row['m']:<5}{row['gops']:8.1f}  {quartiles:<17}"
                     f"{row['speedup']:7.2f}x{'' if peak is None else f'{peak:.0%}':>7}"
                     f"{'' if read is None else f'{read:.0%}':>9}".rstrip())
    lines.append("float32: times its speed; peak, reading: shares of what is above")
    transform = result["transform"]
    lines.append(f"\nrotating and quantizing the activations: {transform['share']:.0%} of "
                 f"{transform['scheme']} at m = {transform['m']}")
    return "\n".join([*lines, "", advice(result)])


def advice(result: Mapping[str, Any]) -> str:
    """One line: the scheme to take here, and how much faster than float32 it is.

    The most accurate scheme that is within a tenth of the fastest, by the geometric mean over m.
    """
    speed: dict[str, float] = {}
    for scheme in dict.fromkeys(row["scheme"] for row in result["rows"]):
        rows = [row["speedup"] for row in result["rows"] if row["scheme"] == scheme]
        speed[scheme] = float(np.exp(np.mean(np.log(rows))))
    ours = {s: speed[s] for s in sorted(speed, key=lambda s: -SCHEMES.get(s, 0)) if s != FLOAT32}
    best = next(s for s in ours if ours[s] >= 0.9 * max(ours.values()))
    text = f"advice: {best}, {ours[best]:.1f} times as fast as float32 here"
    fastest = max(ours, key=ours.__getitem__)
    if fastest != best:
        text += f"; {fastest}, {ours[fastest] / ours[best]:.2f} times that, is less accurate"
    elif best == "w4a4":
        text += "; w4a8 is closer to the original"
    return text
