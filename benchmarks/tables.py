"""Markdown tables and the form of their cells, as all pages and reports have them."""

from __future__ import annotations

from collections.abc import Sequence


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, last: bool = False
) -> str:
    """Markdown; the first `left` columns are text, and so is the last where `last` says so."""
    marks = ["---"] * left + ["---:"] * (len(header) - left)
    if last:
        marks[-1] = "---"
    return "\n".join(line(cells) for cells in [header, marks, *rows])


def line(cells: Sequence[str]) -> str:
    """A table's line."""
    return f"| {' | '.join(cells)} |"


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def times(value: float) -> str:
    return f"{value:.2f}x"


def between(page: str, marks: tuple[str, str], text: str) -> str:
    """A page with a text in place of what stands between two marks of it."""
    begin, rest = page.split(marks[0])
    return f"{begin}{marks[0]}\n\n{text}\n\n{marks[1]}{rest.split(marks[1])[1]}"
