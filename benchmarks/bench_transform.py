"""The online transform: dense factors against Hadamards and chains of Givens rotations, per k.

    python -m benchmarks.bench_transform [--quick] [--tokens 512] [--json FILE] [--keep]

Microseconds per token, one thread, transform and 4-bit quantization in one pass, medians of
interleaved runs:

    quantize    no transform
    dense       both factors as matrices, in float32: what runs at inference up to order 512
    hadamard    H on both axes as a fast transform, no rotations behind it (in float64, as it is
                applied to factors above 512)
    chain       the same with the rotations of two uniformity sweeps per axis behind it

and what each needs in multiply-adds per input: k1 + k2 for dense factors, log2(k1) + log2(k2)
additions for the Hadamards, and 4 (k1 - 1) + 4 (k2 - 1) for the chains, each of whose 2 (n - 1) n /
2 rotations takes 4 on two of n values. So a chain cannot win below any order, however it is
written; a bare Hadamard could, but no default method ends in one. `share` is the dense transform
with quantization in the time of a whole W4A4 linear of k x k outputs.
"""

import argparse
from functools import partial

import numpy as np

from singlequant import _C

from . import common

WIDTHS = [4096, 5120, 8192, 11008, 14336]
SWEEPS = 2


def orthogonal(order):
    return _C.random_orthogonal(order, order).astype(np.float32)


def chain(order, sweeps):
    """A factor (order, hadamard, pairs, angles): every pair once per sweep."""
    pairs = np.array(np.triu_indices(order, 1), np.int32).T
    angles = np.random.default_rng(order).uniform(-np.pi, np.pi, sweeps * len(pairs))
    return (order, True, np.tile(pairs, (sweeps, 1)), angles)


def bench_width(k, tokens, seconds):
    k1, k2 = _C.factor_sizes(k)
    rng = np.random.default_rng(k)
    x = rng.standard_normal((tokens, k)).astype(np.float32)
    words = rng.integers(-(2**31), 2**31, (k, -(-k // 8))).astype(np.int32)
    one = _C.PackedWeight(words[:1], np.ones(1, np.float32), k)  # one output: next to nothing
    square = _C.PackedWeight(words, np.ones(k, np.float32), k)
    forms = {
        "dense": _C.Rotation(k, orthogonal(k1), orthogonal(k2)),
        "hadamard": _C.Rotation(k, chain(k1, 0), chain(k2, 0)),
        "chain": _C.Rotation(k, chain(k1, SWEEPS), chain(k2, SWEEPS)),
    }
    few = x[: max(1, tokens // 16)]  # chains take long
    functions = {
        "quantize": partial(_C.linear, x, one),
        "linear": partial(_C.linear, x, square, 4, 1.0, forms["dense"]),
        **{name: partial(_C.linear, x if name == "dense" else few, one, 4, 1.0, form)
           for name, form in forms.items()},
    }
    times = common.interleave(functions, seconds)
    rows = {"quantize": tokens, "linear": tokens, "dense": tokens}
    micros = {name: 1e6 * t["median"] / rows.get(name, len(few)) for name, t in times.items()}
    return {
        "k": k, "k1": k1, "k2": k2, "tokens": tokens,
        **{f"{name}_us_per_token": value for name, value in micros.items()},
        "dense_gflops": 2e-3 * k * (k1 + k2) / (micros["dense"] - micros["quantize"]),
        "share": micros["dense"] / micros["linear"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one width, few tokens")
    parser.add_argument("--tokens", type=int, default=512)
    common.add_output(parser, "transform")
    arguments = parser.parse_args()
    _C.set_num_threads(1)
    values = common.environment()
    common.print_environment(values)
    print(f"{'k':>6} {'k1':>4} {'k2':>4}  us/token: quantize   dense hadamard    chain  "
          "dense GFLOP/s  share of k x k W4A4")
    rows = []
    for k in WIDTHS[:1] if arguments.quick else WIDTHS:
        row = bench_width(k, 32 if arguments.quick else arguments.tokens,
                          0.2 if arguments.quick else 3.0)
        rows.append(row)
        print(f"{k:6} {row['k1']:4} {row['k2']:4} {row['quantize_us_per_token']:18.1f} "
              f"{row['dense_us_per_token']:7.1f} {row['hadamard_us_per_token']:8.1f} "
              f"{row['chain_us_per_token']:8.1f} {row['dense_gflops']:14.0f} {row['share']:20.1%}",
              flush=True)
    common.write_result({"what": "transform", "environment": values, "quick": arguments.quick,
                         "rows": rows}, arguments.json, arguments.keep and "transform")


if __name__ == "__main__":
    main()
