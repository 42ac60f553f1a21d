"""One packed folder through three routes: native, transformers, the harness; how far they differ.

    python -m benchmarks.routes FOLDER [--windows 32] [--length 256] [--json FILE]

It needs the torch extra. Windows of the bundled held-out text go through `singlequant.load` with a
cache of 32 bits, through transformers with our modules, and through the scores that the harness
asks for. Differences are from the native route: the largest of a logit, that of the perplexity in
percent with the standard error over windows, and the largest of a window's log-likelihood in nats.
"""

import argparse

import numpy as np

import singlequant as sq
from singlequant import _C
from singlequant.harness import score_continuations
from singlequant.study.evaluate import split_windows

from . import common


def likelihoods(logits, windows):
    """Log-likelihood in nats of each window's tokens after the first."""
    return [-float(_C.negative_log_likelihood(rows[:-1], tokens[1:]).sum())
            for rows, tokens in zip(logits, windows, strict=True)]


def perplexity(sums, windows):
    return float(np.exp(-sum(sums) / (windows.shape[0] * (windows.shape[1] - 1))))


def through_harness(model, windows):
    """The same sums as the harness gets them: a token of context, and a continuation."""
    pairs = [(tokens[:1].tolist(), tokens[1:].tolist()) for tokens in windows]
    sums = [0.0] * len(pairs)
    for index, score, _ in score_continuations(model, pairs, windows.shape[1]):
        sums[index] = score
    return sums


def agreement(folder, count, length):
    """The figures of a folder; at most `count` windows."""
    import torch
    from transformers import AutoModelForCausalLM

    import singlequant.integrations.transformers  # noqa: F401

    native = sq.load(folder, kv_bits=32)
    windows = split_windows(native.encode(sq.bundled_text("heldout")), length)[:count]
    other = AutoModelForCausalLM.from_pretrained(folder)
    found, expected, largest, off = [], [], 0.0, 0.0
    for tokens in windows:  # one at a time: logits are large
        logits = native.forward(tokens[None])
        with torch.inference_mode():
            theirs = other(torch.from_numpy(tokens[None])).logits.numpy()
        largest = max(largest, float(np.abs(logits).max()))
        off = max(off, float(np.abs(theirs - logits).max()))
        expected += likelihoods(logits, tokens[None])
        found += likelihoods(theirs, tokens[None])
    harness = through_harness(native, windows)
    ours, theirs = perplexity(expected, windows), perplexity(found, windows)
    means = (np.array(expected) - found) / (windows.shape[1] - 1)  # of a window's tokens
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0
    return {"scheme": native.checkpoint.quant_config.scheme, "windows": len(windows),
            "length": length, "largest_logit": largest, "logit": off, "perplexity": ours,
            "perplexity_transformers": theirs, "percent": 100 * abs(theirs / ours - 1),
            "percent_stderr": 100 * error,
            "harness": max(abs(a - b) for a, b in zip(harness, expected, strict=True))}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="+", help="packed folders")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    common.add_output(parser)
    arguments = parser.parse_args(argv)
    rows = []
    print("scheme  largest logit  off by    perplexity  in transformers  off by                 "
          "  harness off")
    for folder in arguments.folder:
        row = agreement(folder, arguments.windows, arguments.length)
        rows.append({"folder": str(folder), **row})
        print(f"{row['scheme']:<7} {row['largest_logit']:13.1f}  {row['logit']:<8.2g}  "
              f"{row['perplexity']:10.4f}  {row['perplexity_transformers']:15.4f}  "
              f"{row['percent']:.5f} % +- {row['percent_stderr']:.5f}   {row['harness']:g} nats",
              flush=True)
    common.write_result({"rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
