"""What each default of the recipe brings: the default recipe, and one row for each change of it.

    python -m benchmarks.defaults MODEL --text FILE [FILE...] [--calibration FILE]
        [--change "bits=4"] [--change "group_size=32 bits=4.35"] [--seeds 0,1] [--windows N]
        [--seq-len N] [--out DIR]

A change is a list of KEY=VALUE: keys of QuantConfig, or `calibration`, which is "self", "mixed" or
a file. Each row is quantized once for each seed, which draws the calibration windows. KL is the
divergence from MODEL in nats per token, of the mean over the seeds, with their standard deviation
behind it. MB are those of the folder's weights. Seconds are those of `quantize`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import singlequant as sq
from singlequant.study.evaluate import CachedScorer, evaluate, split_windows
from singlequant.sweep.bits import predict_noise, spend

from .experiments import command as options
from .experiments.report import Report, add_spread

NAME = "defaults"
CALIBRATION = "calibration"


def changes_of(text: str) -> dict[str, Any]:
    """{"bits": 4, ...} of "bits=4 ..."; a value is JSON where it can be, or else a word."""
    found = {}
    for part in text.split():
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise argparse.ArgumentTypeError(f"expected KEY=VALUE, found {part!r}")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def recipe_of(changes: dict[str, Any], seed: int) -> sq.QuantConfig:
    """The default recipe but for the changes. ValueError names a key that is none."""
    settings = {key: value for key, value in changes.items() if key != CALIBRATION}
    return replace(sq.QuantConfig.from_json(settings), seed=seed)


def row_of(
    arguments: argparse.Namespace, changes: dict[str, Any], original: CachedScorer,
    texts: dict[str, NDArray[np.int64]],
) -> dict[str, Any]:
    """One recipe under every seed, on every text."""
    row: dict[str, Any] = {"change": " ".join(f"{k}={v}" for k, v in changes.items()) or "none"}
    figures: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            summary = sq.quantize_folder(arguments.model, out, recipe_of(changes, seed),
                                         changes.get(CALIBRATION, arguments.calibration))
            weights = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            found = {"megabytes": weights / 1e6, "seconds": summary.seconds}
            for name, tokens in texts.items():
                result = evaluate(sq.load(out), tokens, arguments.seq_len, original)
                found[f"{name} KL"] = result.kl_mean
                found[f"{name} perplexity"] = result.perplexity / result.reference_perplexity - 1
        for key, value in found.items():
            figures.setdefault(key, []).append(value)
    for key, values in figures.items():
        add_spread(row, values, key)
    print(f"{row['change']}: " + ", ".join(f"{name} KL {row[f'{name} KL']:.5f}" for name in texts),
          flush=True)
    return row


def foreseen(model: sq.Model, calibration: str | None) -> str:
    """What `quantize` predicts before it chooses the bits of embedding and head."""
    config = sq.QuantConfig()
    windows = sq.calibration_windows(model.checkpoint, config, calibration)
    noise = predict_noise(model.checkpoint, windows)
    linears = noise.divergence(spend(noise.shares, config.bits))
    return (f"Predicted KL: {linears:.5f} of linears with {config.bits:g} bits, {noise.tables:.5f} "
            "of embedding and head with 6 bits instead of 8.")


def run(arguments: argparse.Namespace) -> Report:
    """All rows of the command as its report."""
    recipes = [{}, *arguments.change]
    for changes in recipes:
        recipe_of(changes, 0)
    if arguments.threads:
        sq.set_num_threads(arguments.threads)
    model = sq.load(arguments.model)
    texts = {}
    for path in arguments.text:
        windows = split_windows(model.encode(path.read_text("utf-8")), arguments.seq_len)
        texts[path.stem] = windows[: arguments.windows].reshape(-1)
    original = CachedScorer(model)
    rows = [row_of(arguments, changes, original, texts) for changes in recipes]
    columns = [("change", "change", "")]
    for name in texts:
        columns += [(f"{name}: KL", f"{name} KL", ".5f"), ("sd", f"{name} KL_sd", ".5f"),
                    ("perplexity", f"{name} perplexity", "+.2%")]
    columns += [("MB", "megabytes", ".1f"), ("seconds", "seconds", ".0f")]
    name = model.checkpoint.name
    tokens = ", ".join(f"{len(t)} of {n}" for n, t in texts.items())
    notes = [f"Changes of the default recipe, which is the first row. Seeds: "
             f"{', '.join(map(str, arguments.seeds))}. Tokens: {tokens}, in windows of "
             f"{arguments.seq_len}. Perplexity is that above the original's.",
             foreseen(model, arguments.calibration)]
    return Report(f"defaults-{name}", f"Changes of the default recipe, {name}", columns, rows,
                  notes, name)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.bare_parser(__doc__, NAME)
    parser.prog = f"python -m benchmarks.{NAME}"
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE",
                        help="to evaluate on")
    parser.add_argument("--change", type=changes_of, action="append", default=[],
                        metavar="KEY=VALUE...", help="a row more, with these values")
    parser.add_argument("--calibration", metavar="FILE", help="self, mixed or a file (default: the "
                        "bundled text)")
    parser.add_argument("--seeds", type=options.integers, default=[0, 1], metavar="N,M",
                        help="(default 0,1)")
    parser.add_argument("--windows", type=options.positive, metavar="N",
                        help="the first windows of each text (default: all)")
    parser.add_argument("--seq-len", type=options.positive, default=512,
                        help="tokens of a window (default %(default)s)")
    parser.add_argument("--threads", type=options.positive, metavar="N")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="write defaults-MODEL.md, .csv and .json there")
    return options.parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    with options.errors_of(NAME):
        run(arguments).write(arguments)


if __name__ == "__main__":
    main()
