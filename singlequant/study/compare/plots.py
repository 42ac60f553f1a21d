# SPDX-License-Identifier: Apache-2.0
"""A comparison as a picture. Needs matplotlib, of the extra 'plots'."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from ...figures import new_figure
from .rows import Row
from .table import Comparison, row_name


def draw(comparison: Comparison):
    """matplotlib Figure: the KL of each method on a log axis, in nats per token.

    A panel per scheme and a row of panels per text. The perplexity stands beside each dot. Rows
    that differ in the seed alone are dots of one line.
    """
    texts, original = comparison.texts, comparison.rows[0]
    schemes = list(dict.fromkeys(row.scheme for row in comparison.rows if row.config))
    height = max(len(lines_of(comparison, scheme)) for scheme in schemes)
    size = (1 + 5 * len(schemes), len(texts) * (1.3 + 0.32 * height))
    figure = new_figure(*size)
    panels = figure.subplots(len(texts), len(schemes), squeeze=False, sharex="row")
    for (t, text), (s, scheme) in itertools.product(enumerate(texts), enumerate(schemes)):
        _draw_panel(panels[t, s], lines_of(comparison, scheme), t)
        panels[t, s].set(title=f"{comparison.model}, {scheme}, {text}")
        if t == len(texts) - 1:
            panels[t, s].set_xlabel("KL to the original, nats per token")
    perplexities = ", ".join(f"{result.perplexity:.2f} on {text}" for result, text
                             in zip(original.results, texts, strict=True))
    figure.suptitle(f"beside each dot: perplexity (the original's: {perplexities})",
                    fontsize="small")
    return figure


def lines_of(comparison: Comparison, scheme: str) -> dict[str, list[Row]]:
    """A scheme's rows by label; rows that differ in the seed alone share one."""
    rows = [row for row in comparison.rows if row.scheme == scheme and row.config]
    several = len({row.config.weights for row in rows if not row.default}) > 1
    lines: dict[str, list[Row]] = {}
    for row in rows:
        rounding = f", {row.config.weights}" if several and not row.default else ""
        lines.setdefault(row_name(row) + rounding, []).append(row)
    return lines


def _draw_panel(axis, lines: Mapping[str, list[Row]], t: int) -> None:
    """One dot per row with figures, the perplexity beside the line's last, a word where none."""
    axis.set_xscale("log")
    axis.set_yticks(range(len(lines)), labels=list(lines))
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.grid(axis="both", color="0.9")
    axis.set_axisbelow(True)
    for y, rows in enumerate(lines.values()):
        done = [row.results[t] for row in rows
                if row.results and 0 < row.results[t].kl_mean < math.inf]
        if not done:
            axis.annotate("failed", (0.02, y), xycoords=("axes fraction", "data"), va="center",
                          fontsize="small", color="0.5")
            continue
        kl = [result.kl_mean for result in done]
        axis.plot(kl, [y] * len(kl), "o", color="tab:orange" if rows[0].default else "tab:blue")
        mean = sum(result.perplexity for result in done) / len(done)
        axis.annotate(f"{mean:.2f}", (max(kl), y), xytext=(7, 0), textcoords="offset points",
                      va="center", fontsize="small")
    axis.margins(x=0.2)  # room for the figures
