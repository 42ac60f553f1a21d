# SPDX-License-Identifier: Apache-2.0
"""Outliers of every site, before and after each step of its transformation: figures and pictures.

All figures are of the evenly spaced tokens that calibration keeps (512 of each site) and of as many
rows of the site's weights. `Measures` has the definitions. The gains alone are of all tokens and
rows.
"""

from .channels import plot_channels
from .measures import MASSIVE, NORMAL, NORMAL_SHARE, Measures, measure
from .plots import plot_errors, plot_heatmaps, plot_overview, plot_surface
from .result import (
    FIGURE_FIELDS,
    GAIN_FIELDS,
    IDENTITY_FIELDS,
    Inspection,
    OutlierRow,
    Surface,
)
from .run import inspect_model, own_config
from .steps import transform, transform_weights, transformation_steps
from .tables import site_table, step_table

__all__ = [
    "FIGURE_FIELDS",
    "GAIN_FIELDS",
    "IDENTITY_FIELDS",
    "MASSIVE",
    "NORMAL",
    "NORMAL_SHARE",
    "Inspection",
    "Measures",
    "OutlierRow",
    "Surface",
    "inspect_model",
    "measure",
    "own_config",
    "plot_channels",
    "plot_errors",
    "plot_heatmaps",
    "plot_overview",
    "plot_surface",
    "site_table",
    "step_table",
    "transform",
    "transform_weights",
    "transformation_steps",
]
