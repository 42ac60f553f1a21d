# SPDX-License-Identifier: Apache-2.0
"""An inspection as pictures; matplotlib is imported when one is drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...figures import new_figure
from ...files import require_matplotlib
from .result import Inspection, Surface

COLOURS = ("#999999", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe-Ito
FIELD_LABELS = {
    "peak": "(max / rms)² of a token, mean",
    "kurtosis": "kurtosis",
    "utilization": "utilization of the codes",
    "fill": "mean|x| / (max / 2)",
    "flatness": "distance from flat channels",
    "activation_error": "relative squared error of the activations",
    "output_error": "relative squared error of the outputs",
    "largest": "largest / median magnitude",
}


def plot_heatmaps(inspection: Inspection, field: str = "peak", figure=None):
    """Layers x sites of one figure, the original and each method's result side by side.

    All panels share one logarithmic colour scale. Returns the matplotlib Figure (or the SubFigure
    given). ImportError without matplotlib; ValueError for an unknown field.
    """
    _check_field(field)
    layers = sorted({row.layer for row in inspection.rows})
    sites = inspection.sites
    panels = [("original", inspection.select(step=0, method=inspection.methods[0]))]
    panels += [(name, inspection.select(final=True, method=name)) for name in inspection.methods]
    if figure is None:
        figure = new_figure(1.6 + 2.4 * len(panels), 1.8 + min(0.32 * len(layers), 12))
    require_matplotlib()
    from matplotlib.colors import LogNorm

    grids = []
    for _, rows in panels:
        grid = np.full((len(layers), len(sites)), np.nan)
        for row in rows:
            grid[layers.index(row.layer), sites.index(row.site)] = getattr(row, field)
        grids.append(grid)
    found = np.concatenate([grid[grid > 0] for grid in grids])
    low, high = (found.min(), found.max()) if found.size else (1.0, 10.0)
    norm = LogNorm(low, high if high > low else low * 1.01)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, _), grid in zip(axes, panels, grids, strict=True):
        image = axis.imshow(grid, cmap="cividis", norm=norm, aspect="auto", origin="upper")
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(len(sites)), sites, fontsize=8)
        axis.tick_params(length=0)
        if len(layers) <= 16:
            _annotate(axis, grid, norm)
    every = max(1, len(layers) // 16)
    axes[0].set_yticks(range(0, len(layers), every), layers[::every], fontsize=8)
    axes[0].set_ylabel("layer")
    colorbar = figure.colorbar(image, ax=list(axes), pad=0.02)
    colorbar.ax.tick_params(labelsize=8)
    colorbar.set_label(f"{FIELD_LABELS[field]}\n(log scale, shared)", fontsize=8)
    return figure


def _annotate(axis, grid: NDArray, norm) -> None:
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            dark = value <= 0 or norm(value) < 0.55
            axis.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")


def plot_errors(inspection: Inspection, field: str = "output_error", figure=None):
    """Bars: per site the error of the original and of each method, means over the layers.

    The thin line spans the layers. Returns the Figure, as plot_heatmaps does.
    """
    _check_field(field)
    sites = inspection.sites
    series = [("original", {"step": 0, "method": inspection.methods[0]})]
    series += [(name, {"final": True, "method": name}) for name in inspection.methods
               if inspection.select(method=name, final=True)[0].step]
    if figure is None:
        figure = new_figure(2.2 + 1.4 * len(sites), 3.4)
    require_matplotlib()
    from matplotlib import rcParams

    axis = figure.subplots()
    width = 0.8 / len(series)
    for i, (name, where) in enumerate(series):
        values = [[getattr(row, field) for row in inspection.select(site=site, **where)]
                  for site in sites]
        means = np.array([np.mean(v) for v in values])
        spans = np.array([[m - min(v), max(v) - m] for m, v in zip(means, values, strict=True)]).T
        at = np.arange(len(sites)) + (i - (len(series) - 1) / 2) * width
        axis.bar(at, means, width * 0.94, label=name, color=COLOURS[i % len(COLOURS)])
        axis.errorbar(at, means, np.maximum(spans, 0), fmt="none", lw=0.8,
                      ecolor=rcParams["axes.edgecolor"])
        for x, mean, top in zip(at, means, means + spans[1], strict=True):
            axis.annotate(f"{mean:.2g}", (x, max(top, mean)), (0, 2), fontsize=7, ha="center",
                          textcoords="offset points")
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * 1.5)
    axis.set_xticks(range(len(sites)), sites)
    axis.set_ylabel(f"{FIELD_LABELS[field]}\n{inspection.bits}-bit activations, log scale",
                    fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=len(series), loc="lower center",
                bbox_to_anchor=(0.5, 1.0), title="mean over layers; the line spans them",
                title_fontsize=8)
    return figure


def plot_overview(inspection: Inspection):
    """Heat maps of the peaks above, error bars below: the command's --picture."""
    layers = len({row.layer for row in inspection.rows})
    above = 1.6 + min(0.32 * max(layers, 4), 12)
    figure = new_figure(max(7.5, 1.6 + 2.4 * (1 + len(inspection.methods))), above + 3.4)
    figure.suptitle(f"{inspection.model}: outliers before and after", fontsize=11)
    top, bottom = figure.subfigures(2, 1, height_ratios=[above, 3.4])
    plot_heatmaps(inspection, figure=top)
    plot_errors(inspection, figure=bottom)
    return figure


def plot_surface(inspection: Inspection):
    """The 3-D surface of |activation| over tokens and channels, before and after.

    All panels have the same z scale; a cell is the largest of its tokens and channels. Returns the
    Figure. ValueError for an inspection made without surface=True; ImportError without matplotlib.
    """
    surface = inspection.surface
    if surface is None:
        raise ValueError("surface: expected an inspection made with surface=True, found none")
    count = len(surface.panels)
    columns = count if count <= 3 else -(-count // 2)
    lines = -(-count // columns)
    figure = new_figure(5.0 * columns, 0.35 + 3.85 * lines)
    room = 3.85 / (0.35 + 3.85 * lines)  # of the height, for a line of panels
    figure.set_layout_engine("none")  # it leaves 3-D axes too little room
    top = max(float(cells.max()) for _, cells in surface.panels) or 1.0
    for i, (name, cells) in enumerate(surface.panels):
        line, column = divmod(i, columns)
        place = ((column - 0.02) / columns, (lines - 1 - line) * room, 1 / columns, room)
        axis = figure.add_axes(place, projection="3d")
        _draw_surface(axis, surface, cells, top)
        axis.set_title(f"{name}: largest {cells.max():.3g}", fontsize=10, y=0.98)
    figure.suptitle(f"{inspection.model}, layer {surface.layer}, inputs of {surface.site}: "
                    f"|activation| of {surface.tokens} tokens (same z scale)", fontsize=11)
    return figure


def _draw_surface(axis, surface: Surface, cells: NDArray[np.float32], top: float) -> None:
    """One panel; a face has the colour of its highest corner, or thin peaks would look low."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    cells = np.pad(cells, [(0, max(0, 2 - n)) for n in cells.shape], mode="edge")  # faces need two
    tokens, channels = ((np.arange(n) + 0.5) * length / n for n, length in
                        zip(cells.shape, (surface.tokens, surface.channels), strict=True))
    highest = np.maximum(cells[:-1], cells[1:])
    highest = np.maximum(highest[:, :-1], highest[:, 1:])
    colours = colormaps["cividis"](PowerNorm(0.5, 0, top)(highest))
    axis.plot_surface(*np.meshgrid(channels, tokens), cells, facecolors=colours, linewidth=0,
                      rcount=cells.shape[0], ccount=cells.shape[1], antialiased=False, shade=False)
    axis.set_zlim(0, top)
    axis.set_xlabel("channel", fontsize=9)
    axis.set_ylabel("token", fontsize=9)
    axis.set_zlabel("|activation|", fontsize=9, labelpad=1)
    axis.tick_params(labelsize=7, pad=1)
    axis.view_init(elev=26, azim=-58)
    axis.set_box_aspect((1.35, 1.0, 0.85), zoom=1.0)


def _check_field(field: str) -> None:
    if field not in FIELD_LABELS:
        raise ValueError(f"field: expected one of {', '.join(FIELD_LABELS)}, found {field!r}")
