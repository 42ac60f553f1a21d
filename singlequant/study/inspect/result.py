# SPDX-License-Identifier: Apache-2.0
"""What an inspection found: rows of figures, and the surface of one site."""

from __future__ import annotations

import csv
import dataclasses
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...files import check_picture, save_figure, write_file
from .measures import Measures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class OutlierRow(Measures):
    """One site after one step (0: the original); `final` marks the whole transformation.

    output_error: |x W^T - Q(x') Q(W')^T|^2 / |x W^T|^2 on the sample, x', W' the transformed inputs
    and weight rows, computed by the runtime's integer kernels.
    balance_gain, alignment_gain: what the rms balance, and the alignment of the site's blocks,
    promise over the site as it is, in dB of the outputs' signal-to-noise ratio (`methods.gain`).
    They are of all calibration tokens and weight rows, and equal in all rows of a site. None where
    the site cannot have one.
    """

    output_error: float
    layer: int
    site: str
    method: str
    step: int
    name: str
    final: bool
    tokens: int
    channels: int
    balance_gain: float | None = None
    alignment_gain: float | None = None


IDENTITY_FIELDS = ("layer", "site", "method", "step", "name", "final", "tokens", "channels")
FIGURE_FIELDS = ("largest", "normal", "peak", "kurtosis", "utilization", "fill", "flatness",
                 "activation_error", "output_error")
GAIN_FIELDS = ("balance_gain", "alignment_gain")


@dataclass(frozen=True, eq=False, repr=False)
class Surface:
    """|x| of one site, each cell the largest of its tokens and channels: what a picture shows."""

    layer: int
    site: str
    tokens: int  # before they were gathered in cells
    channels: int
    panels: tuple[tuple[str, NDArray[np.float32]], ...]  # (name, [cells, cells]); original first

    def __repr__(self) -> str:
        names = ", ".join(name for name, _ in self.panels)
        return f"Surface(layer {self.layer}, {self.site}, {self.tokens}x{self.channels}, {names})"


@dataclass(frozen=True, repr=False)
class Inspection:
    """What `inspect_model` found."""

    model: str  # name of the folder
    methods: tuple[str, ...]
    bits: int  # of the activations' codes
    clip: float
    weights: str  # rounding of the weights
    calibration_tokens: int
    massive: tuple[float, ...]
    normal: float
    normal_share: float
    rows: tuple[OutlierRow, ...]
    surface: Surface | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        sites = len({(row.layer, row.site) for row in self.rows})
        return (f"Inspection({self.model!r}, {', '.join(self.methods)}, {sites} sites, "
                f"{len(self.rows)} rows, {self.bits} bits)")

    def _repr_html_(self) -> str:
        from .tables import inspection_html

        return inspection_html(self)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the inspected sites, in the model's order."""
        return tuple(dict.fromkeys(row.site for row in self.rows))

    def select(self, **where: Any) -> list[OutlierRow]:
        """Rows whose fields have these values: select(site="down", final=True)."""
        return [row for row in self.rows if all(getattr(row, k) == v for k, v in where.items())]

    def plot(self, path: str | Path | None = None) -> Figure:
        """matplotlib Figure of the outliers before and after; see `plots.plot_overview`.

        Saved to `path` when given: the suffix is the format, and the file appears only when whole.
        ImportError without matplotlib.
        """
        if path is not None:
            check_picture(path)
        from .plots import plot_overview

        figure = plot_overview(self)
        if path is not None:
            save_figure(figure, path)
        return figure

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values, without the surface; from_json() takes it back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["surface"]
        rows = [dataclasses.asdict(row) | {"massive": list(row.massive)} for row in self.rows]
        return values | {"methods": list(self.methods), "massive": list(self.massive),
                         "rows": rows}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Inspection:
        """The inspection of a dict that `to_json` made. ValueError when it is another."""
        try:
            rows = tuple(OutlierRow(**{**row, "massive": tuple(row["massive"])})
                         for row in values["rows"])
            return cls(**{**values, "methods": tuple(values["methods"]),
                          "massive": tuple(values["massive"]), "rows": rows})
        except (KeyError, TypeError) as error:
            raise ValueError(f"inspection: expected what to_json writes, found: {error}") from None

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained web page: figures, pictures, tables and what the words mean.

        The file appears only when whole. ImportError without matplotlib.
        """
        from .page import inspection_page

        return write_file(path, inspection_page(self))

    def to_csv(self) -> str:
        """A line per row; massive_T counts the entries beyond T times the median.

        A gain that a site cannot have is empty.
        """
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        massive = [f"massive_{t:g}" for t in self.massive]
        writer.writerow([*IDENTITY_FIELDS, *massive, *FIGURE_FIELDS, *GAIN_FIELDS])
        for row in self.rows:
            identity, figures, gains = (
                [getattr(row, name) for name in names]
                for names in (IDENTITY_FIELDS, FIGURE_FIELDS, GAIN_FIELDS))
            writer.writerow([*identity, *row.massive, *figures, *gains])
        return out.getvalue()
