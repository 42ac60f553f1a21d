"""Decode of one layer's attention over a long context, by bits of the KV cache, one thread.

    python -m benchmarks.bench_attention [--quick] [--threads 1] [--batches 1,16]
        [--contexts 512,2048] [--json FILE] [--keep]

Heads of LLaMA-2-7B (32 of 128) and LLaMA-3-8B (32 of 128 that share 8 key and value heads). The
layer's linears are a sliver (a hidden size of 32, intermediate 8), so that what is timed is the
rotary embedding, the Hadamard, the cache and the attention; their share is measured at a context
of one and printed. GB/s counts the bytes of the pages' whole tokens that a step reads. Each width
has a cache of its own and the widths take turns.
"""

import argparse
import sys
import time
from functools import partial

import numpy as np

from singlequant import _C

from . import common

HEADS = {"LLaMA-2-7B": (32, 32, 128), "LLaMA-3-8B": (32, 8, 128)}
BITS = (32, 16, 8, 4)
HIDDEN = 32


def make_layer(heads, kv_heads, head_dim):
    rng = np.random.default_rng(0)
    q, kv = heads * head_dim, kv_heads * head_dim
    inv_freq = (10000.0 ** (-np.arange(head_dim // 2) * 2 / head_dim)).astype(np.float32)

    def linear(site, n, k):
        return site, rng.standard_normal((n, k)).astype(np.float32) / 6, None

    norm = ("rms", 1e-6, 0.0, np.ones(HIDDEN), None)
    return _C.DecoderLayer(
        HIDDEN,
        {"qkv": (HIDDEN, None, 16, 1.0), "o": (q, None, 16, 1.0),
         "up": (HIDDEN, None, 16, 1.0), "down": (8, None, 16, 1.0)},
        {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "window": 0,
         "scale": head_dim**-0.5, "rotary": {"inv_freq": inv_freq}, "q": linear("qkv", q, HIDDEN),
         "k": linear("qkv", kv, HIDDEN), "v": linear("qkv", kv, HIDDEN),
         "o": linear("o", HIDDEN, q)},
        {"activation": "silu", "gate": linear("up", 8, HIDDEN), "up": linear("up", 8, HIDDEN),
         "down": linear("down", HIDDEN, 8)},
        {"before_attention": norm, "before_mlp": norm},
    )


def step(layer, cache, hidden, position):
    """Every sequence's token at position: one decode step of a batch."""
    batch = len(hidden)
    layer.forward(hidden.copy(), np.arange(batch), np.full(batch, position), cache, 0)


def filled_cache(layer, bits, batch, kv_heads, head_dim, context):
    rng = np.random.default_rng(1)
    cache = _C.KVCache(1, batch, kv_heads, head_dim, context, bits)
    for sequence in range(batch):
        for first in range(0, context - 1, 64):  # a page at a time
            m = min(64, context - 1 - first)
            hidden = rng.standard_normal((m, HIDDEN)).astype(np.float32)
            layer.forward(hidden, np.full(m, sequence), np.arange(first, first + m), cache, 0)
    return cache


def bench(name, batch, context, seconds):
    """Rows of one shape, batch and context. With one thread in CPU seconds, else in seconds."""
    heads, kv_heads, head_dim = HEADS[name]
    layer = make_layer(heads, kv_heads, head_dim)
    hidden = np.random.default_rng(2).standard_normal((batch, HIDDEN)).astype(np.float32)
    caches = {bits: filled_cache(layer, bits, batch, kv_heads, head_dim, context) for bits in BITS}
    functions = {}
    for bits, cache in caches.items():
        functions[bits] = partial(step, layer, cache, hidden, context - 1)
        one = filled_cache(layer, bits, batch, kv_heads, head_dim, 1)
        functions[f"{bits} alone"] = partial(step, layer, one, hidden, 0)
    clock = time.process_time if _C.get_num_threads() == 1 else time.perf_counter
    times = common.interleave(functions, seconds, min_repeats=7, clock=clock)
    rows = []
    for bits, cache in caches.items():
        stored = batch * context * cache.page_bytes / cache.page_tokens
        rows.append({"model": name, "kv_bits": bits, "batch": batch, "context": context,
                     "microseconds_per_token": times[bits]["median"] * 1e6 / batch,
                     "without_context": times[f"{bits} alone"]["median"] * 1e6 / batch,
                     "stored_bytes": stored, "gb_per_second": stored / times[bits]["median"] * 1e-9,
                     "speedup": times[32]["median"] / times[bits]["median"], **times[bits]})
    return rows


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half a second each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=common.integers, default=[1, 16], metavar="A,B")
    parser.add_argument("--contexts", type=common.integers, default=[512, 2048], metavar="A,B")
    common.add_output(parser, "attention")
    return parser.parse_args(argv)


def main():
    arguments = parse(sys.argv[1:])
    _C.set_num_threads(arguments.threads)
    values = common.environment()
    common.print_environment(values)
    print("microseconds per token of one layer (at a context of one), GB/s of stored cache, times "
          "the speed of float32")
    rows = []
    for name in HEADS:
        for batch in arguments.batches:
            for context in arguments.contexts:
                found = bench(name, batch, context, 0.5 if arguments.quick else 4.0)
                rows += found
                text = "".join(
                    f"  kv{r['kv_bits']:<2} {r['microseconds_per_token']:7.0f} "
                    f"({r['without_context']:4.0f}) {r['gb_per_second']:5.1f} {r['speedup']:4.2f}x"
                    for r in found
                )
                print(f"{name} batch {batch:<3} context {context:<5}{text}", flush=True)
    common.write_result({"what": "attention", "environment": values, "quick": arguments.quick,
                         "threads": arguments.threads, "rows": rows},
                        arguments.json, arguments.keep and "attention")


if __name__ == "__main__":
    main()
