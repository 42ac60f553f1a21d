# SPDX-License-Identifier: Apache-2.0
"""An inspection as one web page for a person who was not there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...info import __version__
from ..page import card, details, facts, page, picture, section, table
from .plots import plot_errors, plot_heatmaps, plot_surface
from .result import Inspection, OutlierRow
from .tables import GAIN_HEADINGS, figure_cells, headings

WORDS = {
    "site": "one input of a layer, and the linears that read it: qkv, o, gate_up, down",
    "MO>T": "massive entries: beyond T times the median magnitude",
    "largest": "the largest magnitude over the median",
    "NO": "channels that are outliers in many tokens",
    "peak²/rms²": "(largest / root mean square)² of a token, on average; what rounding costs grows "
                  "with it, 1 would be ideal",
    "kurtosis": "how heavy the tails are: 3 for a bell curve, 1.8 for evenly spread values",
    "utiliz.": "share of the codes' bits that carry information",
    "fill": "how evenly values are spread up to the largest, 1 is evenly",
    "flatness": "how unequal the channels are, 0 is equal",
    "act. err": "squared error of the quantized activations over their square sum",
    "out. err": "the same of what the linears make of them: what counts in the end",
    "balance dB, align dB": "gain that scaling or aligning the channels promises",
}


def inspection_page(inspection: Inspection) -> str:
    """The page. ImportError without matplotlib."""
    layers = len({row.layer for row in inspection.rows})
    methods = ", ".join(inspection.methods)
    lead = (f"Quantizing to {inspection.bits} bits gives each token {2**inspection.bits} codes, "
            f"spread up to its largest value. A few large values (outliers) leave few codes to all "
            f"others. This page shows the inputs of {layers} layers as they are, and behind "
            f"each transformation: {methods}.")
    pictures = [picture(lambda: plot_heatmaps(inspection),
                        "How far the largest value of a token stands out, by layer and site: the "
                        "smaller, the better. All panels have the same colours."),
                picture(lambda: plot_errors(inspection),
                        "The error of what the linears compute, with weights quantized as well: "
                        "the lower, the better.")]
    if inspection.surface is not None:
        pictures.append(picture(lambda: plot_surface(inspection),
                                "Magnitudes by token and channel, of the site that stands out "
                                "most."))
    gains = [*GAIN_HEADINGS]
    return page(
        f"{inspection.model}: outliers before and after", lead, _cards(inspection),
        [section("Outliers by layer and site", pictures[0]),
         section("What is lost by rounding", pictures[1]),
         *(section("One site in three dimensions", one) for one in pictures[2:]),
         section("All sites", table(
             _columns(["site", "after"], inspection, _site_lines(inspection)), 2,
             notes=["Means over the layers; MO and NO are sums, largest is the largest."]),
             details("After each step", table(
                 _columns(["method", "site", "after"], inspection, _step_lines(inspection)), 3)),
             details("Layer by layer", table(
                 _columns(["layer", "site", "after"], inspection, _layer_lines(inspection), gains),
                 3))),
         section("What the words mean", facts(WORDS)),
         section("How it was measured", facts({
             "activations": f"{inspection.bits} bits, clip {inspection.clip:g}",
             "weights": f"4 bits, {inspection.weights}",
             "calibration": f"{inspection.calibration_tokens} tokens",
             "outlier channels": f"beyond {inspection.normal:g} times the token's root mean square "
                                 f"in {inspection.normal_share:.0%} of the tokens"}))],
        f"Made by singlequant {__version__}: singlequant inspect {inspection.model} --html PAGE")


def _cards(inspection: Inspection) -> Iterator[str]:
    """The mean error of the outputs before, and after each method."""
    before = _mean_error(inspection.select(step=0, method=inspection.methods[0]))
    yield card(f"{before:.2g}", "mean relative error of the linears' outputs without a "
                                "transformation")
    for method in inspection.methods:
        after = _mean_error(inspection.select(final=True, method=method))
        times = f", {before / after:.1f} times less" if 0 < after < before else ""
        yield card(f"{after:.2g}", f"with {method}{times}")


def _mean_error(rows: Sequence[OutlierRow]) -> float:
    return float(np.mean([row.output_error for row in rows]))


def _columns(
    names: Sequence[str], inspection: Inspection, lines: Sequence[Sequence[str]],
    more: Sequence[str] = (),
) -> list[Sequence[str]]:
    return [*zip([*names, *headings(inspection), *more], *lines, strict=True)]


def _site_lines(inspection: Inspection) -> list[list[str]]:
    """A site as it is, and after each whole method."""
    lines = []
    for site in inspection.sites:
        rows = inspection.select(site=site, step=0, method=inspection.methods[0])
        lines.append([site, "original", *figure_cells(rows)])
        for method in inspection.methods:
            rows = inspection.select(site=site, method=method, final=True)
            if rows[0].step:
                lines.append([site, method, *figure_cells(rows)])
    return lines


def _step_lines(inspection: Inspection) -> list[list[str]]:
    """A site after each step of each method."""
    groups: dict[tuple[str, str, str], list[OutlierRow]] = {}
    for row in inspection.rows:
        groups.setdefault((row.method, row.site, row.name), []).append(row)
    order = sorted(groups, key=lambda key: (inspection.methods.index(key[0]),
                                            inspection.sites.index(key[1]), groups[key][0].step))
    return [[*key, *figure_cells(groups[key])] for key in order]


def _layer_lines(inspection: Inspection) -> list[list[str]]:
    """Every layer and site, as it is and after each whole method; the gains beside the first."""
    lines = []
    for row in inspection.rows:
        original = row.step == 0 and row.method == inspection.methods[0]
        if original or (row.final and row.step):
            gains = ["" if not original else "-" if value is None else f"{value:.2f}"
                     for value in (row.balance_gain, row.alignment_gain)]
            lines.append([str(row.layer), row.site, "original" if original else row.method,
                          *figure_cells([row]), *gains])
    return lines
