"""What the tests of the benchmarks share: running one, and made-up results of each kind."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(script, *arguments, expect=0):
    """The finished process of a benchmark; warnings are errors in it too."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"benchmarks.{script}", *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=900, cwd=ROOT)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


ENVIRONMENT = {
    "cpu": "Made Up 9000", "cpus": 2, "load": [0.0, 0.0, 0.0], "threads": 1, "date": "2025-01-02",
    "system": "Linux", "blas": "OpenBLAS 0", "commit": "abc", "argv": ["--seconds", "7"],
    "kernels": {"runnable": ["avx2", "generic"], "compiled": ["avx2", "generic"], "active": "avx2",
                "steps": {}},
}


def made_peers():
    speeds = {  # peer -> kind, GOP/s of both shapes at m = 1 and 512
        "ours_w4a4": ("ours", {1: (100, 200), 512: (240, 260)}),
        "ours_w4a8": ("ours", {1: (100, 200), 512: (190, 200)}),
        "bare_w4a4": ("bound", {512: (300, 320)}),
        "ggml_q4_0": ("int4", {1: (50, 40), 512: (90, 91)}),
        "other": ("int4", {1: (30, 80), 512: (100, 90)}),
        "openblas": ("32-bit", {1: (8, 9), 512: (115, 117)}),
    }
    rows = []
    for peer, (kind, found) in speeds.items():
        for m, values in found.items():
            for (n, k), gops in zip(((64, 64), (128, 64)), values, strict=True):
                row = {"peer": peer, "kind": kind, "n": n, "k": k, "m": m, "gops": gops}
                if m == 1:
                    row["share_of_read"] = 0.875
                if peer == "bare_w4a4":
                    row["share_of_peak"] = 0.625
                rows.append(row)
    peers = {p: {"kind": kind, "activations": "made", "version": f"{p} 1"}
             for p, (kind, _) in speeds.items()}
    peers["gone"] = {"kind": "int8", "activations": "made", "skipped": "it is not installed"}
    return {"what": "peers", "environment": ENVIRONMENT, "isa": "avx2", "threads": 1,
            "shapes": [[64, 64], [128, 64]], "peaks": {"fma 256": 111.4}, "peers": peers,
            "cores": {"cpus": [0, 1], "ratio": 1.9}, "rows": rows, "ratios": []}


def made_ladder():
    row = {"table": "avx2", "scheme": "w4a4", "m": 512, "gops": 271.0, "bare_gops": 283.0,
           "bare_share_of_peak": 0.741}
    return {"what": "ladder", "environment": ENVIRONMENT, "shape": [64, 64], "rows": [row],
            "transform": [{"table": "avx2", "scheme": "w4a4", "m": 512, "share": 0.137}],
            "cores": {"cpus": [0, 1], "ratio": 1.97},
            "threads": [{"table": "avx2", "threads": 2, "m": 512, "w4a4": 1.83, "w4a8": 1.74}],
            "peaks": {}}


def made_end_to_end():
    def row(engine, kind, speed):
        return {"engine": engine, "kind": kind, "phase": "decode", "batch": 64,
                "note": "AVX2 | FMA |",
                "tokens_per_s": {"median": speed, "low": speed - 1, "high": speed + 1}}

    rows = [row("our W4A4", "ours", 46.0), row("our W4A8", "ours", 60.0),
            row("our W4A16", "ours", 900.0), row("torch", "16-bit", 20.0),
            row("llama.cpp", "int4", 50.0)]
    environment = {**ENVIRONMENT, "argv": ["--work", "/here", "--layers", "3"], "load": [1.5, 0, 0]}
    return {"environment": environment, "rows": rows}


def made_quantize():
    figures = [("disk, cold file", 2.25, "GB/s"), ("memory, 2 threads", 30.5, "GB/s"),
               ("calibration, 1024 tokens, per 10^9 weights", 11.5, "s"), ("  CPU", 22.5, "s"),
               ("solving rotations (balanced), per 10^9 weights", 3.25, "s"), ("  CPU", 6.25, "s")]
    stage = {"weights": "mse", "cold, s per 10^9": 4.5, "warm, s per 10^9": 3.5,
             "CPU, s per 10^9": 6.75,
             "whole, s per 10^9": 20.5, "read from disk, MB": 400.0, "peak memory, MB": 120.25,
             "bound, MB": 140.0, "target, s per 10^9": 2.85}
    step = {"weights": "mse", "step": "clip search", "CPU ns per weight": 1.125}
    rows = [*({"figure": f, "value": v, "unit": u} for f, v, u in figures), stage, step]
    return {"what": "quantize", "environment": ENVIRONMENT, "rows": rows}


def made_transform():
    row = {"k": 4096, "k1": 64, "k2": 64, "tokens": 512, "quantize_us_per_token": 1.5,
           "linear_us_per_token": 90.0, "dense_us_per_token": 12.25, "hadamard_us_per_token": 20.5,
           "chain_us_per_token": 333.0, "dense_gflops": 97.0, "share": 0.136}
    return {"what": "transform", "environment": ENVIRONMENT, "rows": [row]}


def made_attention():
    row = {"model": "LLaMA-3-8B", "kv_bits": 8, "batch": 16, "context": 2048, "speedup": 2.75,
           "microseconds_per_token": 250.0, "without_context": 12.5, "gb_per_second": 14.5}
    return {"what": "attention", "environment": ENVIRONMENT, "rows": [row]}


def made_side_by_side():
    return {"what": "quantize side by side", "environment": ENVIRONMENT, "model": "small",
            "tokens": 1024, "threads": 2, "ratio": 4.25, "peer": "llm-compressor 1",
            "rows": {"ours": [10.5, 20.5, 30.5], "llm-compressor": [81.5, 87.1, 95.5]}}


def made_sharing():
    return {"environment": ENVIRONMENT, "model": "small", "processes": 2, "alone": 125.0,
            "together": 118.0, "sum_over_alone": 0.94, "cpu_time": 1.06, "rows": []}


VERSIONS = {"torch": "2.13", "transformers": "5.0", "lm_eval": "0.4.13",
            "omp_wait_policy": "passive", "quantized_engine": "x86"}


def made_tasks():
    row = {"task": "choose", "questions": 50, "acc": 0.5, "low": 1.5, "high": 2.5}
    return {"environment": ENVIRONMENT | VERSIONS, "rows": [
        row | {"model": "transformers float32", "median": 8.0, "times_as_fast": 1.0},
        row | {"model": "singlequant w4a8", "median": 2.0, "times_as_fast": 4.0}]}


def made_torch():
    return {"environment": ENVIRONMENT | VERSIONS, "rows": [
        {"model": "bert", "variant": "w4a8", "median": 0.0125, "low": 0.0115, "high": 0.0135,
         "speed_of_int8": 1.25, "speed_of_float32": 2.5, "error": 0.0625, "bytes": 4.5e6}]}
