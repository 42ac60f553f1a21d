# SPDX-License-Identifier: Apache-2.0
"""One self-contained web page: styles, tables and pictures in one file that asks for no other."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..files import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["card", "details", "facts", "page", "picture", "section", "table"]

# Colours that a picture is drawn in, and what the page shows instead, in light and in dark.
INK = "#010203"
SHOWN = {INK: "currentColor", "0.9": "var(--line)", "0.5": "var(--faint)"}
STYLE = {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
         "ytick.color": INK, "axes.facecolor": "none", "figure.facecolor": "none",
         "savefig.facecolor": "none", "svg.fonttype": "path", "svg.hashsalt": "singlequant"}
DPI = 150  # of what is an image within a picture
# Nothing but what stands in the page: a browser refuses every other source.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
CSS = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c2024; --faint: #60666d;
        --line: #dfe3e8; --raised: #f5f7f9; --accent: #0b62b3; --mark: #e6f0fa; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --ink: #e6e9ec; --faint: #9aa3ac; --line: #343a41;
          --raised: #1d2226; --accent: #6db3f2; --mark: #1b3145; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 82rem; background: var(--ground);
       color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p, dl, .note { max-width: 46rem; }
.lead { font-size: 1.08rem; }
.note { color: var(--faint); font-size: .9rem; margin: .4rem 0; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0 0; padding: 0; }
.card { flex: 1 1 13rem; max-width: 24rem; background: var(--raised); border: 1px solid var(--line);
        border-radius: 10px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.5rem; line-height: 1.25; color: var(--accent);
          font-variant-numeric: tabular-nums; }
.card span { display: block; font-size: .9rem; color: var(--faint); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem;
        font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .55rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid var(--line); }
th { background: var(--raised); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
th.text, td.text { text-align: left; }
tr.mark td { background: var(--mark); font-weight: 600; }
figure { margin: 0; }
figure .wide { padding: .6rem; }
figure svg { display: block; margin: 0 auto; max-width: 100%; height: auto; min-width: 34rem; }
figcaption { color: var(--faint); font-size: .9rem; margin-top: .4rem; max-width: 46rem; }
dl { display: grid; grid-template-columns: minmax(5rem, 9.5rem) 1fr; gap: .3rem 1.2rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--accent); font-weight: 600; }
details > * + * { margin-top: .8rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .8rem;
         color: var(--faint); font-size: .85rem; }
@media print { body { max-width: none; } details { display: block; } }
"""


def page(title: str, lead: str, cards: Iterable[str], sections: Iterable[str], made_by: str) -> str:
    """The whole page. title, lead and made_by are text, cards and sections are HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
<div class="cards">{"".join(cards)}</div>
</header>
<main>
{"".join(sections)}
</main>
<footer>{escape(made_by)}</footer>
</body>
</html>
"""


def card(figure: str, what: str) -> str:
    """One large figure, and what it is."""
    return f'<div class="card"><b>{escape(figure)}</b><span>{escape(what)}</span></div>'


def section(heading: str, *parts: str) -> str:
    """A heading and what stands below it, as HTML."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n{''.join(parts)}\n</section>\n"


def details(summary: str, *parts: str) -> str:
    """Parts that are shown when the reader asks for them."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def note(text: str) -> str:
    """A line below a table."""
    return f'<p class="note">{escape(text)}</p>'


def facts(values: Mapping[str, object]) -> str:
    """Names and values, or words and what they mean."""
    pairs = (f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
             for name, value in values.items())
    return f"<dl>{''.join(pairs)}</dl>"


def table(
    columns: Sequence[Sequence[str]], left: int, marked: Iterable[int] = (),
    notes: Iterable[str] = (),
) -> str:
    """A table of columns, each with its header first. `left` columns are text, the others numbers.

    marked: indices of rows that stand out, the header's not counted.
    """
    head, *rows = zip(*columns, strict=True)
    kinds = [' class="text"' if i < left else "" for i in range(len(columns))]
    marked = set(marked)

    def line(tag: str, cells: Sequence[str], kind: str = "") -> str:
        shown = (f"<{tag}{k}>{escape(str(cell).strip())}</{tag}>"
                 for k, cell in zip(kinds, cells, strict=True))
        return f"<tr{kind}>{''.join(shown)}</tr>\n"

    body = (line("td", row, ' class="mark"' if i in marked else "") for i, row in enumerate(rows))
    return (f'<div class="wide" tabindex="0"><table><thead>{line("th", head)}</thead><tbody>'
            f'{"".join(body)}</tbody></table></div>{"".join(map(note, notes))}')


def picture(draw: Callable[[], Figure], caption: str) -> str:
    """What `draw` draws, as SVG in the page, in the page's own colours. ImportError without
    matplotlib."""
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.colors import to_hex

    text = io.StringIO()
    with rc_context(STYLE):
        figure = draw()
        for axis in figure.axes:
            for faces in axis.collections if axis.name == "3d" else ():
                faces.set_rasterized(True)  # thousands of them: smaller as one image
        figure.savefig(text, format="svg", dpi=DPI, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg"):]
    for drawn, shown in SHOWN.items():
        svg = svg.replace(to_hex(drawn), shown)
    return (f'<figure role="img" aria-label="{escape(caption)}"><div class="wide">{svg}</div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>")
