# SPDX-License-Identifier: Apache-2.0
"""How fast a whole model is: prefill and decode in tokens per second, in the terms of llama-bench.

ppN: N random tokens, from an empty cache to the logits behind the last one. tgN: N steps of one
random token each, from an empty cache, each to the logits of the next token. Nothing is sampled and
nothing is turned into text. Each is run once before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import _C
from ..info import machine_info
from ..runtime.model import Model
from ..runtime.open import load

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 512, 128, 5  # llama-bench's defaults


def bench_model(
    path: str | Path,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    kv_bits: int | None = None,
    dequantize: bool = False,
) -> dict[str, Any]:
    """Time prefill and decode of a folder, on the threads of the pool.

    A dict for JSON: environment, model, and tests, a row of llama-bench's fields for each. 0 tokens
    leave a test out. ValueError names an argument that is out of range.
    """
    least = {"prompt_tokens": (prompt_tokens, 0), "new_tokens": (new_tokens, 0),
             "repeats": (repeats, 1)}
    for name, (value, low) in least.items():
        if value < low:
            raise ValueError(f"{name}: expected at least {low}, got {value}")
    if prompt_tokens == new_tokens == 0:
        raise ValueError("prompt_tokens, new_tokens: expected one of them above 0, got 0 and 0")
    model = load(path, kv_bits, dequantize)
    limit = model.spec.max_position_embeddings
    for name, (value, _) in list(least.items())[:2]:
        if value > limit:
            raise ValueError(f"{name}: expected at most {limit} (max_position_embeddings), "
                             f"got {value}")
    tokens = np.random.default_rng(0).integers(0, model.spec.vocab,
                                               max(prompt_tokens, new_tokens))
    rows = []
    for kind, run, count in (("pp", prefill, prompt_tokens), ("tg", decode, new_tokens)):
        if count:
            seconds = timed(lambda run=run, count=count: run(model, tokens[:count]), repeats)
            rows.append({"test": f"{kind}{count}", "n_prompt": count if kind == "pp" else 0,
                         "n_gen": count if kind == "tg" else 0, **speeds(count, seconds)})
    checkpoint = model.checkpoint
    return {
        "environment": machine_info(),
        "model": {"name": checkpoint.name, "summary": repr(model),
                  "model_size": checkpoint.bytes_on_disk, "model_n_params": model.spec.parameters,
                  "kv_bits": model.kv_bits},
        "n_threads": _C.get_num_threads(),
        "tests": rows,
    }


def prefill(model: Model, tokens: np.ndarray) -> np.ndarray:
    """Logits [vocab] behind a prompt."""
    hidden = model.new_session(1, len(tokens)).append([tokens])
    return model.logits(hidden[-1:])[0]


def decode(model: Model, tokens: np.ndarray) -> np.ndarray:
    """Logits [vocab] behind the last of tokens that are fed one by one."""
    session = model.new_session(1, len(tokens))
    for i in range(len(tokens)):
        logits = model.logits(session.append([tokens[i : i + 1]]))
    return logits[0]


def timed(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of so many calls, after one that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds


def speeds(count: int, seconds: list[float]) -> dict[str, Any]:
    """llama-bench's fields of a test of count tokens: means, deviations of a sample, samples."""
    times = np.array(seconds)
    rates = count / times

    def deviation(values: np.ndarray) -> float:
        return float(values.std(ddof=1)) if len(values) > 1 else 0.0

    return {
        "avg_ns": round(times.mean() * 1e9), "stddev_ns": round(deviation(times) * 1e9),
        "avg_ts": float(rates.mean()), "stddev_ts": deviation(rates),
        "samples_ns": [round(t * 1e9) for t in seconds], "samples_ts": rates.tolist(),
    }


def report_model(result: Mapping[str, Any]) -> str:
    """What `bench_model` found, as the table that llama-bench prints."""
    model, environment = result["model"], result["environment"]
    rows = [("model", "size", "params", "backend", "threads", "test", "t/s")]
    for test in result["tests"]:
        rows.append((model["name"], f"{model['model_size'] / 2**20:.2f} MiB",
                     f"{model['model_n_params'] / 1e6:.2f} M", environment["kernels"]["active"],
                     str(result["n_threads"]), test["test"],
                     f"{test['avg_ts']:.2f} \u00b1 {test['stddev_ts']:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]),
                                *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:],
                                                                   strict=True))]) + " |"
             for row in rows]
    lines.insert(1, "| " + " | ".join(["-" * widths[0],
                                       *("-" * (w - 1) + ":" for w in widths[1:])]) + " |")
    return "\n".join([
        f"{environment['cpu']}, {environment['threads']} of {environment['cpus']} CPUs, "
        f"load {environment['load'][0]}", model["summary"], "", *lines])
