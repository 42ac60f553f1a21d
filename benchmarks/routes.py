"""One packed folder through three routes: native, transformers, the harness; how far they differ.

    python -m benchmarks.routes FOLDER [--text FILE] [--windows 32] [--length 256]
        [--control TABLE] [--noise] [--by-layer] [--json FILE]

It needs the torch extra. Windows of a text, by default the bundled held-out one, go through
`singlequant.load` with a cache of 32 bits, through transformers with our modules, and through the
scores that the harness asks for. Differences are from the native route: the largest of a logit,
that of the perplexity in percent with its sign and the standard error over windows, and the largest
of a window's log-likelihood in nats. Of the windows it says in how many transformers' is higher.

--control measures one more route: the native one on another kernel table, such as avx2. Tables
that add floats in one order give the same bits.

--noise measures what any two correct routes differ by: the native route once more, with the last
bit of each number that goes from layer to layer moved up, down or not at all, at random.

--by-layer looks for a systematic difference, which noise would hide. Each layer of transformers'
model gets what the native layer got, so that nothing adds up. A token's difference is that of the
layer's outputs, divided by what the layer adds to the token: |y - y0| / |y0 - x|. A fault shows at
most tokens of a layer, and so in the median. A number that lies between two codes and is rounded
to the other one shows at few, and in the largest. "moved" is the share of tokens above 1e-4.
"""

import argparse
from pathlib import Path

import numpy as np

import singlequant as sq
from singlequant import _C
from singlequant.harness import score_continuations
from singlequant.runtime.layers import flat_positions
from singlequant.study.evaluate import split_windows
from singlequant.sweep.text_file import read_text

from . import common

MOVED = 1e-4  # a token's difference at a layer; sums in another order make less than 1e-5


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


def states(model, tokens, moved=None):
    """The native route layer by layer: what goes into each layer of a window, and the last state.

    moved: a generator of random numbers, which moves last bits; None leaves them.
    """
    sequence, position = flat_positions(np.full(1, len(tokens)))
    hidden = model.outer.embed(tokens, position)
    cache = model.new_cache(1, len(tokens), layers=1)
    found = []
    for index in range(model.spec.layers):
        if moved is not None:
            ulps = moved.integers(-1, 2, hidden.shape, np.int8)
            hidden *= 1 + np.finfo(np.float32).eps * ulps.astype(np.float32)
        found.append(hidden.copy())
        model.layer(index).forward(hidden, sequence, position, cache, 0)
    return [*found, hidden]


def through_noise(model, windows):
    """The native route's sums with last bits moved."""
    moved = np.random.default_rng(0)
    finals = (model.outer.finish(states(model, tokens, moved)[-1]) for tokens in windows)
    return [likelihoods(model.logits(final)[None], tokens[None])[0]
            for final, tokens in zip(finals, windows, strict=True)]


def layers_of(model, count):
    """The decoder layers of a transformers model."""
    from torch.nn import ModuleList

    return next(found for found in model.modules()
                if isinstance(found, ModuleList) and len(found) == count)


def through_layers(model, other, tokens):
    """Differences of a window [layers, tokens]: transformers' layers on what ours got."""
    import torch

    ours, theirs, hooks = states(model, tokens), [], []

    def give(index, arguments, named):
        hidden = torch.from_numpy(ours[index])[None]
        return (((hidden, *arguments[1:]), named) if arguments
                else (arguments, named | {"hidden_states": hidden}))

    for index, layer in enumerate(layers_of(other, model.spec.layers)):
        hooks += [layer.register_forward_pre_hook(
            lambda _, arguments, named, index=index: give(index, arguments, named),
            with_kwargs=True), layer.register_forward_hook(
            lambda *of: theirs.append(of[2][0] if isinstance(of[2], tuple) else of[2]))]
    try:
        with torch.inference_mode():
            other(torch.from_numpy(tokens[None]))
    finally:
        for hook in hooks:
            hook.remove()
    return np.array([np.linalg.norm(y.numpy().reshape(x.shape) - y0, axis=1)
                     / np.linalg.norm(y0 - x, axis=1)
                     for x, y0, y in zip(ours, ours[1:], theirs, strict=False)])


def by_layer(model, other, windows):
    """The largest median of a layer, over all the largest, and the share of tokens that moved."""
    found = np.concatenate([through_layers(model, other, tokens) for tokens in windows], axis=1)
    return {"median": float(np.median(found, axis=1).max()), "largest": float(found.max()),
            "moved": float((found > MOVED).mean())}


def difference(found, expected, windows):
    """How far a route's log-likelihoods are from the native ones.

    percent: of the perplexity, above 0 when the route's is higher. percent_stderr: the standard
    error of that over windows. higher: windows in which the route's is.
    """
    means = (np.array(expected) - found) / (windows.shape[1] - 1)  # of a window's tokens, in nats
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0
    return {"percent": 100 * float(np.expm1(means.mean())), "percent_stderr": 100 * error,
            "higher": int((means > 0).sum())}


def agreement(folder, count, length, text=None, control=None, noise=False, layers=False):
    """The figures of a folder; at most `count` windows. control: a kernel table. noise, layers:
    measure them too."""
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
    if noise:
        row["noise"] = difference(through_noise(native, windows), expected, windows)
    if layers:
        row["layers"] = by_layer(native, other, windows)
    return row


def print_causes(row):
    """The lines of a row that say where its differences come from."""
    found = {"the native route, last bits moved": row.get("noise")}
    if "control" in row:
        found[f"the native route on {row['control']['table']}"] = row["control"]
    for name, of in found.items():
        if of is not None:
            print(f"{row['scheme']:<7} {name}: {of['percent']:+.5f} % "
                  f"+- {of['percent_stderr']:.5f}, higher in {of['higher']} of {row['windows']}")
    if "layers" in row:
        of = row["layers"]
        print(f"{row['scheme']:<7} by layer: median at most {of['median']:.1e}, largest "
              f"{of['largest']:.1e}, moved {100 * of['moved']:.3f} %")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="+", help="packed folders")
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: a bundled one")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--control", choices=_C.kernels()["runnable"], metavar="TABLE",
                        help="also the native route on this kernel table")
    parser.add_argument("--noise", action="store_true",
                        help="also the native route with last bits moved at random")
    parser.add_argument("--by-layer", action="store_true",
                        help="also each layer on equal inputs")
    common.add_output(parser)
    arguments = parser.parse_args(argv)
    text = None if arguments.text is None else read_text(arguments.text)
    rows = []
    print("scheme  largest logit  off by    perplexity  in transformers  off by                 "
          "    higher in   harness off")
    for folder in arguments.folder:
        row = agreement(folder, arguments.windows, arguments.length, text, arguments.control,
                        arguments.noise, arguments.by_layer)
        rows.append({"folder": str(folder), **row})
        print(f"{row['scheme']:<7} {row['largest_logit']:13.1f}  {row['logit']:<8.2g}  "
              f"{row['perplexity']:10.4f}  {row['perplexity_transformers']:15.4f}  "
              f"{row['signed_percent']:+.5f} % +- {row['percent_stderr']:.5f}   "
              f"{row['higher']:>3} of {row['windows']}   {row['harness']:g} nats", flush=True)
        print_causes(row)
    common.write_result({"rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
