# SPDX-License-Identifier: Apache-2.0
"""The inputs of one site channel by channel, as they are and transformed, as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...figures import new_figure
from ...rotations import BlockRotation, SiteRotation
from ...statistics import SiteStatistics
from ...sweep.layer import transform_inputs
from .plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Quantile of the tokens, colour, name.
SHADES = ((1.0, COLOURS[5], "largest token"), (0.99, COLOURS[1], "99 % of the tokens"),
          (0.5, "black", "half of the tokens"))


def plot_channels(
    site: SiteStatistics, rotation: SiteRotation | BlockRotation, title: str = "inputs"
) -> Figure:
    """matplotlib Figure of |activation| by channel, before and after a site's transformation.

    It shows the tokens that calibration kept of the site. Both panels have the same height.
    ImportError without matplotlib.
    """
    before, after = np.abs(site.sample), np.abs(transform_inputs(site.sample, rotation))
    figure = new_figure(11, 4)
    axes = figure.subplots(1, 2, sharey=True)
    channels = np.arange(before.shape[1])
    for axis, values, when in zip(axes, (before, after), ("before", "after the transformation"),
                                  strict=True):
        for quantile, shade, label in SHADES:
            # lines, as an area of one channel among thousands is thinner than a pixel
            axis.vlines(channels, 0, np.quantile(values, quantile, axis=0), color=shade, lw=1.5,
                        label=label)
        axis.set(title=f"{title}: {when}", xlabel="channel", xlim=(0, len(channels) - 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("|activation|")
    axes[0].set_ylim(bottom=0)
    axes[1].legend(frameon=False, loc="upper right")  # where there is room
    return figure
