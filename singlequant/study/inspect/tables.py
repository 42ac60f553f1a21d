# SPDX-License-Identifier: Apache-2.0
"""An inspection as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...html import table_html
from .result import FIGURE_FIELDS, GAIN_FIELDS, Inspection, OutlierRow

HEADINGS = ("largest", "NO", "peak²/rms²", "kurtosis", "utiliz.", "fill", "flatness", "act. err",
            "out. err")
GAIN_HEADINGS = ("balance dB", "align dB")


def site_table(inspection: Inspection) -> str:
    """Every layer and site, the original and what the whole transformation makes of it.

    The gains of a site stand in the line of the original; "-": it cannot have one.
    """
    names = {row.name if row.step == 0 else row.method: None for row in inspection.rows}
    label = max(len(name) for name in names)
    lines = [f"layer site     {'after':<{label}} {_heading(inspection)} "
             + " ".join(f"{title:>10}" for title in GAIN_HEADINGS)]
    for row in inspection.rows:
        if row.step == 0 and row.method == inspection.methods[0]:
            lines.append(f"{row.layer:>5} {row.site:<8} {'original':<{label}} {_figures([row])} "
                         f"{_gains(row)}")
        if row.final and row.step:
            lines.append(f"{row.layer:>5} {row.site:<8} {row.method:<{label}} {_figures([row])}")
    return "\n".join(lines)


def step_table(inspection: Inspection) -> str:
    """Every step at each site: means over the layers, massive entries and NO channels in sum."""
    label = max(len(row.name) for row in inspection.rows)
    width = max(len(method) for method in inspection.methods)
    lines = [f"{'method':<{width}} site     {'after':<{label}} {_heading(inspection)}"]
    groups: dict[tuple[str, str, str], list[OutlierRow]] = {}
    for row in inspection.rows:
        groups.setdefault((row.method, row.site, row.name), []).append(row)
    for (method, site, name), rows in sorted(
        groups.items(),
        key=lambda item: (inspection.methods.index(item[0][0]), inspection.sites.index(item[0][1]),
                          item[1][0].step),
    ):
        lines.append(f"{method:<{width}} {site:<8} {name:<{label}} {_figures(rows)}")
    return "\n".join(lines)


def inspection_html(inspection: Inspection) -> str:
    """Every site, as it is and after each whole method: over the layers, as `step_table`."""
    lines = []
    for site in inspection.sites:
        original = inspection.select(site=site, step=0, method=inspection.methods[0])
        lines.append([site, "original", *figure_cells(original)])
        for method in inspection.methods:
            done = inspection.select(site=site, method=method, final=True)
            if done[0].step:
                lines.append([site, method, *figure_cells(done)])
    columns = zip(["site", "after", *headings(inspection)], *lines, strict=True)
    layers = len({row.layer for row in inspection.rows})
    return table_html(
        f"{inspection.model}: inputs of {layers} layers", [*columns], left=2,
        bold=[i for i, line in enumerate(lines) if line[1] == "original"],
        notes=["MO and NO are sums over the layers, largest is the largest, the rest are means",
               f"{inspection.bits}-bit activations, {inspection.calibration_tokens} calibration "
               f"tokens"])


def _gains(row: OutlierRow) -> str:
    values = (getattr(row, name) for name in GAIN_FIELDS)
    return " ".join(f"{'-' if value is None else format(value, '.2f'):>10}" for value in values)


def _heading(inspection: Inspection) -> str:
    return " ".join(f"{title:>10}" for title in headings(inspection))


def headings(inspection: Inspection) -> list[str]:
    """What the cells of `figure_cells` are."""
    return [*(f"MO>{t:g}" for t in inspection.massive), *HEADINGS]


def _figures(rows: Sequence[OutlierRow]) -> str:
    return " ".join(f"{cell:>10}" for cell in figure_cells(rows))


def figure_cells(rows: Sequence[OutlierRow]) -> list[str]:
    """One line: counts in sum, the largest of `largest`, means of the rest."""
    counts = [f"{sum(row.massive[i] for row in rows)}" for i in range(len(rows[0].massive))]
    counts += [f"{max(row.largest for row in rows):.1f}", f"{sum(row.normal for row in rows)}"]
    means = {name: float(np.mean([getattr(row, name) for row in rows])) for name in FIGURE_FIELDS}
    counts += [f"{means[name]:.2f}" for name in ("peak", "kurtosis")]
    counts += [f"{means[name]:.3f}" for name in ("utilization", "fill", "flatness")]
    return counts + [f"{means[name]:.2g}" for name in ("activation_error", "output_error")]
