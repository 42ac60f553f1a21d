# SPDX-License-Identifier: Apache-2.0
"""Results as HTML for notebooks: small tables that need no other file, every text escaped.

Colours are the page's own, so that the tables suit light and dark themes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

LINE = "border-bottom:1px solid rgba(128,128,128,.5)"
PAD = "padding:2px 10px 2px 2px"
FAINT = "opacity:.7;font-size:90%"


def table_html(
    title: str, columns: Sequence[Sequence[object]], left: int = 1, bold: Iterable[int] = (),
    notes: Iterable[str] = (),
) -> str:
    """A table of columns, each with its header first. `left` columns are text, the others numbers.

    bold: indices of rows, the header's not counted. notes: lines below the table.
    """
    align = [f"text-align:{'left' if i < left else 'right'};{PAD}" for i in range(len(columns))]
    head, *rows = zip(*columns, strict=True)
    strong = set(bold)
    lines = [_line("th", head, [f"{a};{LINE}" for a in align])]
    for i, row in enumerate(rows):
        weight = ";font-weight:bold" if i in strong else ""
        lines.append(_line("td", row, [a + weight for a in align]))
    below = "".join(f'<div style="{FAINT}">{escape(note)}</div>' for note in notes)
    return (f'<div style="overflow-x:auto">{_title(title)}<table>{"".join(lines)}</table>'
            f"{below}</div>")


def facts_html(title: str, facts: Mapping[str, object], bold: Iterable[str] = ()) -> str:
    """Two columns, names and values; None values are left out. bold: names that stand out."""
    shown = {name: value for name, value in facts.items() if value is not None}
    strong = set(bold)
    base = f"text-align:left;{PAD}"
    lines = [_line("td", (name, value), [f"{base};{FAINT}", base + (
        ";font-weight:bold" if name in strong else "")]) for name, value in shown.items()]
    return f"<div>{_title(title)}<table>{''.join(lines)}</table></div>"


def megabytes(count: float) -> str:
    """'12.3 MB'."""
    return f"{count / 1e6:.1f} MB"


def _title(text: str) -> str:
    return f"<div><b>{escape(text)}</b></div>"


def _line(tag: str, cells: Sequence[object], styles: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<{tag} style="{style}">{escape(str(cell))}</{tag}>'
                            for cell, style in zip(cells, styles, strict=True)) + "</tr>"
