"""One packed folder through three routes: native, transformers, the harness; how far they differ.

    python -m benchmarks.routes FOLDER [--text FILE] [--windows 32] [--length 256]
        [--control TABLE] [--json FILE]

It needs the torch extra. Windows of a text, by default the bundled held-out one, go through
`singlequant.load` with a cache of 32 bits, through transformers with our modules, and through the
scores that the harness asks for. Differences are from the native route: the largest of a logit,
that of the perplexity in percent with its sign and the standard error over windows, and the largest
of a window's log-likelihood in nats. Of the windows it says in how many transformers' is higher.

--control measures one more route: the native one on another kernel table, such as avx2. Tables
differ in the order of float sums alone. What they differ by is the noise that any two correct
routes differ by.
"""

import argparse
from pathlib import Path

import numpy as np

import singlequant as sq
from singlequant import _C
from singlequant.harness import score_continuations
from singlequant.study.evaluate import split_windows
from singlequant.sweep.text_file import read_text

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


def through_native(model, windows):
    """(log-likelihoods, the logits of one window at a time)."""
    for tokens in windows:  # one at a time: logits are large
        logits = model.forward(tokens[None])
        yield likelihoods(logits, tokens[None])[0], logits


def through_table(folder, windows, table):
    """The native route's sums on another kernel table."""
    active = _C.kernels()["active"]
    _C.use_kernels(table)
    try:
        model = sq.load(folder, kv_bits=32)
        return [found for found, _ in through_native(model, windows)]
    finally:
        _C.use_kernels(active)


def difference(found, expected, windows):
    """How far a route's log-likelihoods are from the native ones.

    percent: of the perplexity, above 0 when the route's is higher. percent_stderr: the standard
    error of that over windows. higher: windows in which the route's is.
    """
    means = (np.array(expected) - found) / (windows.shape[1] - 1)  # of a window's tokens, in nats
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0
    return {"percent": 100 * float(np.expm1(means.mean())), "percent_stderr": 100 * error,
            "higher": int((means > 0).sum())}


def agreement(folder, count, length, text=None, control=None):
    """The figures of a folder; at most `count` windows. control: a kernel table."""
    import torch
    from transformers import AutoModelForCausalLM

    import singlequant.integrations.transformers  # noqa: F401

    native = sq.load(folder, kv_bits=32)
    text = sq.bundled_text("heldout") if text is None else text
    windows = split_windows(native.encode(text), length)[:count]
    other = AutoModelForCausalLM.from_pretrained(folder)
    found, expected, largest, off = [], [], 0.0, 0.0
    for tokens, (ours, logits) in zip(windows, through_native(native, windows), strict=True):
        with torch.inference_mode():
            theirs = other(torch.from_numpy(tokens[None])).logits.numpy()
        largest = max(largest, float(np.abs(logits).max()))
        off = max(off, float(np.abs(theirs - logits).max()))
        expected.append(ours)
        found += likelihoods(theirs, tokens[None])
    harness = through_harness(native, windows)
    signed = difference(found, expected, windows)
    row = {"scheme": native.checkpoint.quant_config.scheme, "windows": len(windows),
           "length": length, "largest_logit": largest, "logit": off,
           "perplexity": perplexity(expected, windows),
           "perplexity_transformers": perplexity(found, windows), **signed,
           "signed_percent": signed["percent"], "percent": abs(signed["percent"]),
           "harness": max(abs(a - b) for a, b in zip(harness, expected, strict=True))}
    if control is not None:
        row["control"] = {"table": control, **difference(
            through_table(folder, windows, control), expected, windows)}
    return row


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="+", help="packed folders")
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: a bundled one")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--control", choices=_C.kernels()["runnable"], metavar="TABLE",
                        help="also the native route on this kernel table")
    common.add_output(parser)
    arguments = parser.parse_args(argv)
    text = None if arguments.text is None else read_text(arguments.text)
    rows = []
    print("scheme  largest logit  off by    perplexity  in transformers  off by                 "
          "    higher in   harness off")
    for folder in arguments.folder:
        row = agreement(folder, arguments.windows, arguments.length, text, arguments.control)
        rows.append({"folder": str(folder), **row})
        print(f"{row['scheme']:<7} {row['largest_logit']:13.1f}  {row['logit']:<8.2g}  "
              f"{row['perplexity']:10.4f}  {row['perplexity_transformers']:15.4f}  "
              f"{row['signed_percent']:+.5f} % +- {row['percent_stderr']:.5f}   "
              f"{row['higher']:>3} of {row['windows']}   {row['harness']:g} nats", flush=True)
        if "control" in row:
            of = row["control"]
            print(f"{row['scheme']:<7} the native route on {of['table']}: {of['percent']:+.5f} % "
                  f"+- {of['percent_stderr']:.5f}, higher in {of['higher']} of {row['windows']}",
                  flush=True)
    common.write_result({"rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
