# SPDX-License-Identifier: Apache-2.0
"""A progress bar: plain on a terminal, a widget in a notebook."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any


class ProgressBar:
    """A progress callback (done, total) that draws a bar with the time left."""

    def __init__(self, bar: Any, what: str, unit: str) -> None:
        self._bar = bar  # of tqdm
        self._shown = self._own = what, unit

    def __call__(self, done: int, total: int) -> None:
        self._show(self._own, done, total)

    def part(self, what: str, unit: str) -> Callable[[int, int], None]:
        """The callback of work before or between, which has the bar while it lasts."""
        return lambda done, total: self._show((what, unit), done, total)

    def _show(self, shown: tuple[str, str], done: int, total: int) -> None:
        if shown != self._shown:
            self._shown = shown
            self._bar.set_description_str(shown[0], refresh=False)
            self._bar.unit = shown[1]
            self._bar.miniters = 0  # what it learned was of other steps
            self._bar.reset(total)
        self._bar.total = total
        self._bar.update(done - self._bar.n)


@contextlib.contextmanager
def progress_bar(what: str, unit: str) -> Iterator[ProgressBar]:
    """A progress callback (done, total) that draws a bar with the time left.

    In a notebook the bar is tqdm's widget, or its text where ipywidgets is not installed. Elsewhere
    it stands on standard error, and is left out where that is no terminal.

        with sq.progress_bar("quantizing", "layer") as progress:
            sq.quantize_folder(MODEL, OUT, progress=progress)
    """
    with new_bar(desc=what, unit=unit) as bar:
        yield ProgressBar(bar, what, unit)


def new_bar(hidden: bool = False, **options: Any) -> Any:
    """A bar of tqdm for where we are, with tqdm's options; it vanishes when it is closed."""
    if in_notebook() and not hidden:
        # tqdm.auto warns without ipywidgets; the text bar needs no warning
        found = importlib.util.find_spec("ipywidgets") is not None
        module = importlib.import_module("tqdm.auto" if found else "tqdm")
        return module.tqdm(leave=False, disable=False, **options)  # a cell is never a terminal
    from tqdm import tqdm

    hidden = hidden or sys.stderr is None  # closed: tqdm would write to it all the same
    return tqdm(leave=False, disable=True if hidden else None, **options)


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
