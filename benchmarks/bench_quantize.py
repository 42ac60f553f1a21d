"""Quantizing a layer of LLaMA-2-7B's shapes: seconds per 10^9 weights, beside what bounds them.

    python -m benchmarks.bench_quantize [--weights rtn mse gptq] [--group-size 0] [--profile]
                                        [--method balanced] [--folder DIR] [--json FILE] [--keep]

The stage that the sweep calls quantize, weights read from disk and shard written, is timed with the
file dropped from the page cache and again with it there. What comes before it, with the default
tokens of each rounding, has its own lines: the choice of bits, calibration, the solver. The sum is
what a model's layers take. Embedding and head are left out, as they are no part of a layer. Beside
them stand the disk's read speed, the memory's and the FMA peak, measured in the same run. --profile
prices each step of one layer in CPU nanoseconds per weight. The weights are random with a few large
channels in the norms; they say nothing about quality.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from singlequant import _C, QuantConfig, load_checkpoint
from singlequant.export.writer import layer_tensors, write_safetensors
from singlequant.methods.solve import solve_layer
from singlequant.rotations import LayerRotations
from singlequant.rows import ROWS_PER_BLOCK
from singlequant.statistics import SiteStatistics
from singlequant.study.bench import best_read
from singlequant.sweep.bits import layer_shares, noise_layers
from singlequant.sweep.calibrate import calibrate
from singlequant.sweep.layer import GptqFactor, Rotation, quantize_layer
from singlequant.sweep.measure import PeakMemory
from singlequant.sweep.texts import calibration_windows

from . import common
from .made_model import LLAMA_2_7B, write_checkpoint

HIDDEN, INTERMEDIATE = LLAMA_2_7B.hidden, LLAMA_2_7B.intermediate
WEIGHTS = LLAMA_2_7B.layer_weights
TARGET = 37 / 13  # seconds per 10^9 weights: 37 s for 13 * 10^9
BLOCK_BYTES = 1 << 24


# ---- the bounds ---------------------------------------------------------------------------------


def drop_cache(path: Path) -> None:
    """Ask the system to forget a file's pages; pages that are mapped somewhere stay."""
    gc.collect()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_speed(path: Path) -> float:
    """GB/s of reading a file through a small buffer."""
    buffer, total = bytearray(BLOCK_BYTES), 0
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total / (time.perf_counter() - start) / 1e9


def fma_peak() -> float | None:
    """GFLOP/s of one core by the float32 step of the active table, None where it has no such."""
    kernels = _C.kernels()
    step = kernels["steps"][kernels["active"]][16]
    return step and _C.measure_peak(step) / 1e9


def memory_speed(threads: int) -> float:
    """GB/s at which the pool's threads read buffers of 256 MiB each, by the fastest read loop."""
    return best_read([np.ones(threads << 28, np.uint8) for _ in range(2)], 1.0)["gbs"]


class RotationSpeed:
    """Share of the FMA peak that the rotation of weight rows reaches on one core."""

    ROWS = 64

    def __init__(self, k: int) -> None:
        self.sizes = _C.factor_sizes(k)
        self.rotation = _C.Rotation(k, *(_C.random_orthogonal(n, n) for n in self.sizes))
        self.x = np.random.default_rng(k).standard_normal((self.ROWS, k), np.float32)

    def best(self) -> float:
        """GFLOP/s, best of a few calls."""
        best, threads = 0.0, _C.get_num_threads()
        _C.set_num_threads(1)
        for _ in range(9):
            start = time.perf_counter()
            for _ in range(4):
                _C.rotate(self.x, self.rotation)
            seconds = time.perf_counter() - start
            best = max(best, 4 * 2 * self.x.size * sum(self.sizes) / seconds / 1e9)
        _C.set_num_threads(threads)
        return best


# ---- the layer ----------------------------------------------------------------------------------


class Meter:
    """Seconds of wall and CPU time, and MB read from disk, of a with block."""

    def __enter__(self) -> Meter:
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        self.blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        return self

    def __exit__(self, *exception: object) -> None:
        self.wall = time.perf_counter() - self.wall
        self.cpu = time.process_time() - self.cpu
        blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock - self.blocks
        self.disk = blocks * 512 / 1e6


def quantize_stage(source: Path, rotations: LayerRotations, config: QuantConfig,
                   out: Path) -> None:
    """What the sweep does to a layer once its rotations are known: read, quantize, write."""
    layer = quantize_layer(load_checkpoint(source), rotations, config)
    write_safetensors(out, layer_tensors(layer, config))


def measure(source: Path, rotations: LayerRotations, config: QuantConfig, out: Path) -> dict:
    """The stage with a cold file, then the best of two with a warm one (GPTQ: the cold one only,
    as reading is little of it)."""
    weights_file, runs = source / "model.safetensors", []
    drop_cache(weights_file)
    for _ in range(1 if config.weights == "gptq" else 3):
        with PeakMemory() as memory, Meter() as meter:
            quantize_stage(source, rotations, config, out)
        runs.append((meter, memory.peak - memory.start))
        out.unlink()
    cold, warm = runs[0][0], min((run[0] for run in runs[1:] or runs), key=lambda m: m.wall)
    scale = 1e9 / WEIGHTS
    return {"weights": config.weights, "cold, s per 10^9": cold.wall * scale,
            "warm, s per 10^9": warm.wall * scale, "CPU, s per 10^9": warm.cpu * scale,
            "read from disk, MB": cold.disk, "peak memory, MB": max(p for _, p in runs) / 1e6,
            "bound, MB": memory_bound(config) / 1e6}


def memory_bound(config: QuantConfig) -> float:
    """Bytes that the stage may take: the packed layer, which waits to be written whole, scratch of
    a few MB per thread, and for GPTQ the largest site's Gram matrix beside a block of rows in
    float32, its codes and its copies of them."""
    scales = WEIGHTS // config.group_size if config.group_size else 4 * HIDDEN + 3 * INTERMEDIATE
    packed = WEIGHTS / 2 + 4 * scales
    bound = packed + 16e6 + 8e6 * _C.get_num_threads()
    if config.weights == "gptq":
        blocks = ROWS_PER_BLOCK * (4 + 1 + 4) + 2048 * (4 + 1 + 1)  # of rows, of tokens
        bound += 4 * INTERMEDIATE**2 + blocks * INTERMEDIATE
    return 1.1 * bound


# ---- where the time goes ------------------------------------------------------------------------


@contextmanager
def add_cost(prices: dict[str, float], step: str) -> Iterator[None]:
    """Add the block's CPU seconds to a step."""
    start = time.process_time()
    yield
    prices[step] = prices.get(step, 0.0) + time.process_time() - start


def profile(source: Path, rotations: LayerRotations, config: QuantConfig, out: Path) -> dict:
    """CPU seconds of each step over the layer's weights, in the order in which they happen.

    The fused pass is taken apart by doing a step more each time: its steps are differences.
    """
    checkpoint, prices = load_checkpoint(source), {}
    layer = checkpoint.layer(0)
    for name, site in checkpoint.spec.layer(0).sites.items():
        rotation = rotations.sites[name]
        gptq = None
        if config.weights == "gptq":
            gptq = _profile_factor(prices, rotations.statistics.sites[name], rotation, config)
        for role in site.roles:
            weight = layer.linears[role].weight
            for first in range(0, len(weight), ROWS_PER_BLOCK):
                block = weight[first : first + ROWS_PER_BLOCK]
                _profile_rows(prices, block, rotation, config, gptq)
        del gptq
    quantized = quantize_layer(checkpoint, rotations, replace(config, weights="rtn"))
    with add_cost(prices, "write and sync"):
        write_safetensors(out, layer_tensors(quantized, config))
    out.unlink()
    return prices


def _profile_factor(
    prices: dict[str, float], statistics: SiteStatistics, rotation: Rotation, config: QuantConfig
) -> GptqFactor:
    """What `gptq_factor` makes; each step adds its cost."""
    columns = None if rotation.balance is None else 1 / rotation.balance
    with add_cost(prices, "inputs: rotate, round, Gram matrix"):
        gram = _C.gram(statistics.inputs, None, config.calibration_bits, rotation.of_inputs,
                       columns)
    with add_cost(prices, "Cholesky factor"):
        factor = _C.gptq_factor(gram, config.gptq_damping, config.gptq_order, True)
    with add_cost(prices, "factor in 8 bits"):
        return GptqFactor(*factor, _C.gptq_feedback(factor[0]))


def _profile_rows(
    prices: dict[str, float], block: NDArray, rotation: Rotation, config: QuantConfig,
    gptq: GptqFactor | None,
) -> None:
    """One block of a weight's rows."""
    transform, columns, group = rotation.of_weights, rotation.balance, config.group_size
    if columns is None:
        columns = np.ones(rotation.k, np.float32)
    if gptq is not None:
        with add_cost(prices, "read, widen, balance, rotate"):
            rows = _C.transform_weight(block, transform, columns)
        with add_cost(prices, "GPTQ rounding"):
            codes, _ = _C.gptq_round(rows, gptq.factor, gptq.permutation, 4, group, True,
                                     feedback=gptq.feedback)
        with add_cost(prices, "pack"):
            _C.pack(codes)
        return
    steps = {"read, widen, round and pack": (block, group),
             "balance": (block, group, False, None, columns),
             "rotate": (block, group, False, transform, columns)}
    if config.weights == "mse":
        steps["clip search"] = (block, group, True, transform, columns)
    before = 0.0
    for step, arguments in steps.items():
        seconds = min(_cpu_seconds(arguments) for _ in range(2))
        prices[step] = prices.get(step, 0.0) + seconds - before
        before = seconds


def _cpu_seconds(arguments: tuple) -> float:
    start = time.process_time()
    _C.quantize_weight(*arguments)
    return time.process_time() - start


# ---- report -------------------------------------------------------------------------------------


class Figures(list):
    """Rows of the JSON; `report` adds a figure and prints it."""

    def report(self, name: str, value: float | None, unit: str) -> None:
        self.append({"figure": name, "value": value, "unit": unit})
        print(f"{name:<58} {'not measured' if value is None else f'{value:.2f} {unit}'}")

    def report_seconds(self, name: str, meter: Meter) -> None:
        """Wall and CPU seconds of what a layer took, for 10^9 weights."""
        self.report(f"{name}, per 10^9 weights", meter.wall * 1e9 / WEIGHTS, "s")
        self.report("  CPU", meter.cpu * 1e9 / WEIGHTS, "s")


def report_machine(rows: Figures, weights_file: Path, threads: int) -> None:
    """What the disk, the memory and the FMA units can do."""
    drop_cache(weights_file)
    rows.report("disk, cold file", read_speed(weights_file), "GB/s")
    rows.report("page cache", read_speed(weights_file), "GB/s")
    rows.report(f"memory, {threads} threads", memory_speed(threads), "GB/s")
    for k in (HIDDEN, INTERMEDIATE):
        peak, speed = fma_peak(), RotationSpeed(k).best()
        peak = peak and max(peak, fma_peak())
        rows.report(f"rotation of rows of {k}, one core", speed, "GFLOP/s")
        rows.report("  of the FMA peak", peak and 100 * speed / peak, "%")


def report_bits(rows: Figures, source: Path, config: QuantConfig) -> float:
    """The choice of bits for the layer's linears; seconds."""
    checkpoint = load_checkpoint(source)
    windows = calibration_windows(checkpoint, config)
    with Meter() as meter:
        for layer in noise_layers(checkpoint, windows, config.calibration_bits):
            dict(layer_shares(checkpoint, layer))
    rows.report_seconds("choosing the bits of linears", meter)
    return meter.wall


def report_rotations(rows: Figures, source: Path, config: QuantConfig
                     ) -> tuple[LayerRotations, float]:
    """Calibrate and solve the layer, and the seconds of both; with the inputs where GPTQ wants
    them."""
    checkpoint = load_checkpoint(source)
    windows = calibration_windows(checkpoint, config)
    with Meter() as calibrated:
        statistics = next(calibrate(checkpoint, windows, keep_inputs=config.weights == "gptq",
                                    bits=config.calibration_bits))
    rows.report_seconds(f"calibration, {windows.size} tokens", calibrated)
    with Meter() as solved:
        rotations = solve_layer(statistics, config)
    rows.report_seconds(f"solving rotations ({config.method})", solved)
    return rotations, calibrated.wall + solved.wall


def report_profile(rows: Figures, weights: str, prices: dict[str, float]) -> None:
    """CPU nanoseconds per weight of each step of one rounding."""
    print(f"\n{weights}: CPU ns per weight")
    for step, seconds in prices.items():
        nanoseconds = seconds / WEIGHTS * 1e9
        rows.append({"weights": weights, "step": step, "CPU ns per weight": nanoseconds})
        print(f"  {step:<26} {nanoseconds:8.2f}")
    print(f"  {'together':<26} {sum(prices.values()) / WEIGHTS * 1e9:8.2f}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=("rtn", "mse", "gptq"),
                        default=["rtn", "mse", "gptq"])
    parser.add_argument("--method", default=QuantConfig().method)
    parser.add_argument("--group-size", type=int, default=0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the made model lies for the run")
    common.add_output(parser, "quantize")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    environment = common.environment()
    common.print_environment(environment)
    threads, rows = _C.get_num_threads(), Figures()
    changes = {"method": arguments.method, "group_size": arguments.group_size}
    configs = [QuantConfig(weights=weights, **changes) for weights in arguments.weights]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, out = Path(folder) / "made", Path(folder) / "layer.safetensors"
        write_checkpoint(source, 1)
        report_machine(rows, source / "model.safetensors", threads)
        bits = report_bits(rows, source, configs[0])
        for config in configs:
            print(f"\n{config.weights}, {threads} threads; the target is {TARGET:.2f} s per 10^9")
            rotations, before = report_rotations(rows, source, config)
            row = measure(source, rotations, config, out)
            whole = row["warm, s per 10^9"] + (bits + before) * 1e9 / WEIGHTS
            rows.append(row | {"whole, s per 10^9": whole, "target, s per 10^9": TARGET})
            print("  ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{value:<4}"
                            for key, value in rows[-1].items()))
            if arguments.profile:
                report_profile(rows, config.weights, profile(source, rotations, config, out))
    common.write_result({"what": "quantize", "environment": environment,
                         "method": arguments.method,
                         "threads": threads, "rows": rows},
                        arguments.json, arguments.keep and "quantize")


if __name__ == "__main__":
    main()
