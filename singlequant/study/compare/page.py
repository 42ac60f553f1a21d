# SPDX-License-Identifier: Apache-2.0
"""A comparison as one web page for a person who was not there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...files import not_finite
from ...info import __version__
from ..page import card, facts, page, picture, section, table
from .rows import Row

if TYPE_CHECKING:
    from .table import Comparison

WORDS = {
    "scheme": "bits of weights and activations: w4a8 = weights of about 4 bits, activations of 8",
    "method": "how activations are transformed so that few bits hold them",
    "weights": "how weights are rounded: rtn = to nearest, mse = with a searched clip, gptq = with "
               "error feedback",
    "perplexity": "how surprised the model is by the text: lower is better",
    "KL": "mean divergence of the next-token distribution from the original's, in nats per token: "
          "0 is the original, lower is closer",
    "KL p99": "the divergence that 99 % of the tokens stay below",
    "top-1": "share of tokens at which both models find the same next token likeliest",
    "seconds": "what each stage took on the machine below",
    "peak MB": "largest memory while the model was quantized, besides the mapped weights",
    "disk MB": "size of the folder",
}


def comparison_page(
    comparison: Comparison, columns: Sequence[Sequence[str]], left: int, best: Iterable[int],
    notes: Iterable[str],
) -> str:
    """The page. columns, of which the first `left` are text: the comparison's table. best: its rows
    with the lowest divergence. notes: the lines below it."""
    from .plots import draw

    schemes = [*dict.fromkeys(row.scheme for row in comparison.rows if row.config)]
    lead = (f"{comparison.model} was quantized in {len(comparison.rows) - 1} ways, in "
            f"{' and '.join(schemes)}. Each is measured beside the original on the same text. The "
            f"divergence (KL) says how far a quantized model moved from the original; 0 is none.")
    return page(
        f"{comparison.model}: methods side by side", lead, _cards(comparison),
        [section("How close each method stays", picture(
            lambda: draw(comparison),
            "A dot is one quantized model: further left is closer to the original. The number "
            "beside it is its perplexity.")),
         section("All figures", table(columns, left, best, notes)),
         section("What the words mean", facts(WORDS)),
         section("How it was measured", facts(_measured(comparison)))],
        f"Made by singlequant {__version__}: singlequant compare {comparison.model} --html PAGE")


def _cards(comparison: Comparison) -> Iterator[str]:
    """The original, and the closest model of each scheme, on the first text."""
    text, original = comparison.texts[0], comparison.rows[0]
    size = "" if original.bytes_on_disk is None else f", {original.bytes_on_disk / 1e6:.1f} MB"
    yield card(_number(original.results[0].perplexity, ".2f"),
               f"perplexity of the original on {text}{size}")
    for scheme in dict.fromkeys(row.scheme for row in comparison.rows if row.config):
        rows = [row for row in comparison.rows if row.scheme == scheme and row.config
                and row.results and not_finite(row.results[0].kl_mean) is None]
        if rows:
            yield _scheme_card(scheme, min(rows, key=lambda row: row.results[0].kl_mean))


def _scheme_card(scheme: str, row: Row) -> str:
    result = row.results[0]
    size = "" if row.bytes_on_disk is None else f", {row.bytes_on_disk / 1e6:.1f} MB"
    return card(f"KL {result.kl_mean:.4f}",
                f"the closest in {scheme}: {row.method}, {row.config.weights}; perplexity "
                f"{_number(result.perplexity, '.2f')}{size}")


def _measured(comparison: Comparison) -> dict[str, object]:
    machine = comparison.machine
    predictions = [str(result.predictions) for result in comparison.rows[0].results]
    found = {
        "texts": ", ".join(comparison.texts),
        "predictions": f"{', '.join(predictions)}, in windows of {comparison.seq_len} tokens",
        "calibration": Path(comparison.calibration).name,  # a folder is its owner's
        "CPU": machine.get("cpu"), "threads": machine.get("threads"),
        "kernels": (machine.get("kernels") or {}).get("active"), "date": machine.get("date"),
        "fingerprint": comparison.fingerprint,
    }
    return {name: value for name, value in found.items() if value is not None}


def _number(value: float, form: str) -> str:
    return not_finite(value) or format(value, form)
