"""What ART and URT each contribute: nothing, ART, URT, both (the paper), Hadamard, singlequant.

    python -m benchmarks.experiments.ablation [MODEL] [--text FILE --text FILE]
        [--calibration FILE] [--seeds 0] [--windows N] [--quick] [--out DIR]

Perplexity, KL to the original model and top-1 agreement of each transformation at equal rounding
(to nearest, no clip) from one calibration. The run can be stopped and started again.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import singlequant as sq

from . import command, report

NAME = "ablation"
NAMES = {
    "none": "none",
    "art": "ART only",
    "urt": "URT only",
    "paper": "ART and URT (paper)",
    "hadamard": "Hadamard",
    "singlequant": "singlequant",
}
MEASURES = ("perplexity", "kl_mean", "top1_agreement")


def rows_of(found: sq.Comparison) -> list[dict[str, object]]:
    """One row per text and method, means over the seeds; the original's first."""
    rows = []
    for t, text in enumerate(found.texts):
        for method in ("original", *NAMES):
            same = [row for row in found.rows if row.method == method]
            row = {"text": text, "transformation": NAMES.get(method, method), "method": method,
                   "seeds": len(same)}
            errors = [r.error for r in same if r.error]
            if errors:
                row["error"] = errors[0]
            else:
                for name in MEASURES:
                    report.add_spread(row, [getattr(r.results[t], name) for r in same], name)
            rows.append(row)
        hadamard = next(r for r in rows if r["text"] == text and r["method"] == "hadamard")
        for row in rows[-len(NAMES):]:
            if row.get("kl_mean") and hadamard.get("kl_mean"):
                row["kl_to_hadamard"] = row["kl_mean"] / hadamard["kl_mean"]
    return rows


def draw(rows: list[dict[str, object]], title: str):
    """A panel per measure, a line of the panel per transformation, a marker per text."""
    figure, axes = report.figure(1, 3, height=3.4, sharey=True)
    if figure is None:
        return None
    texts = list(dict.fromkeys(row["text"] for row in rows))
    places = {method: y for y, method in enumerate(NAMES)}
    shift = 0.24 / max(1, len(texts) - 1)
    for t, text in enumerate(texts):
        done = [r for r in rows if r["text"] == text and r["method"] in NAMES and "kl_mean" in r]
        original = next(r for r in rows if r["text"] == text and r["method"] == "original")
        y = [places[row["method"]] + (t - (len(texts) - 1) / 2) * shift for row in done]
        values = ([r["kl_mean"] for r in done],
                  [100 * (r["perplexity"] / original["perplexity"] - 1) for r in done],
                  [100 * (1 - r["top1_agreement"]) for r in done])
        for axis, x in zip(axes[0], values, strict=True):
            axis.plot(x, y, linestyle="", label=text, **report.style(t))
    heads = ("KL to the original, nats per token", "perplexity above the original's, %",
             "tokens with another top-1, %")
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_xlabel(head)
        axis.set_xscale("log")  # a value of 0 or below is not drawn
        report.plain_ticks(axis, "x")
    axes[0, 0].set_yticks(range(len(NAMES)), labels=list(NAMES.values()))
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def ablation(arguments: Namespace) -> None:
    with command.progress("ablation") as progress:
        found = sq.compare(
            arguments.model, methods=list(NAMES), texts=arguments.text, seeds=arguments.seeds,
            calibration=arguments.calibration, defaults=False, progress=progress,
            **command.comparison_options(arguments),
        )
    rows = rows_of(found)
    columns = (
        ("text", "text", ""), ("transformation", "transformation", ""),
        ("perplexity", "perplexity", ".3f"), ("KL", "kl_mean", ".5f"),
        *([("sd over seeds", "kl_mean_sd", ".5f")] if len(arguments.seeds) > 1 else []),
        ("KL / Hadamard's", "kl_to_hadamard", ".3f"), ("top-1", "top1_agreement", ".3f"),
    )
    title = (f"Ablation, {found.model}, {arguments.scheme.upper()}, weights and activations to "
             "nearest")
    tokens = found.rows[0].results[0].predictions
    notes = [f"{tokens} predictions on {found.texts[0]}, windows of {found.seq_len} tokens."]
    notes += [f"{r['transformation']}: {r['error']}" for r in rows if "error" in r]
    report.Report(NAME, title, columns, rows, notes, found.model).write(
        arguments, figure=draw(rows, title))


def main(argv: list[str] | None = None) -> None:
    options = command.parser(__doc__, NAME)
    options.add_argument("--text", type=Path, action="append", help="to evaluate on; given once "
                         "per text (default: the bundled held-out text)")
    options.add_argument("--calibration", type=Path, help="(default: the bundled text)")
    options.add_argument("--seeds", type=command.integers, default=[0], help="draws of the "
                         "calibration tokens, 0,1,2 (%(default)s: the text's first tokens)")
    arguments = command.parse(options, argv)
    with command.errors_of(NAME):
        ablation(arguments)


if __name__ == "__main__":
    main()
