# SPDX-License-Identifier: Apache-2.0
"""matplotlib figures, of the extra `plots`: made outside pyplot's state, shown by notebooks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .files import require_matplotlib
from .progress import in_notebook

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty Figure, sizes in inches. A notebook shows it where it is a cell's last value.

    ImportError without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    if in_notebook():
        _teach_notebook(Figure)
    return Figure(figsize=(width, height), layout="constrained")


def _teach_notebook(figure: type) -> None:
    """Have the kernel draw figures. `%matplotlib inline` and pyplot do that too: theirs stays."""
    shell = sys.modules["IPython"].get_ipython()
    formatter = shell.display_formatter.formatters["image/png"]
    try:
        formatter.lookup_by_type(figure)
    except KeyError:
        from IPython.core.pylabtools import select_figure_formats

        select_figure_formats(shell, {"png"})
