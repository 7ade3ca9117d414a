"""The report as a self-contained HTML file: maps, ceilings, plot, models, skipped contestants."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from . import ceilings, crossover
from .crossover_html import crossover_parts
from .report_cells import Cell, Place, Row, WinMap, win_maps
from .report_rows import headline, model_table

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --none: #f0f2f4;
  --win: #2f81d6; --loss: #e0702e; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --ink: #e6edf3; --soft: #93a0ad; --line: #2d343d;
  --none: #1b2129; --win: #1f6fbf; --loss: #b9561c; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p, li { color: var(--soft); } pre { color: var(--soft); white-space: pre-wrap; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 2px; font-variant-numeric: tabular-nums; }
th { font-weight: 600; text-align: left; padding: .2rem .6rem; color: var(--soft); white-space: nowrap; }
td { padding: .2rem .6rem; text-align: right; background: var(--none); border-radius: 3px; white-space: nowrap; }
td.win { background: color-mix(in oklab, var(--win) var(--much), var(--none)); }
td.loss { background: color-mix(in oklab, var(--loss) var(--much), var(--none)); }
.new { border-top: .5rem solid var(--page); }
img { max-width: 100%; background: #fff; border-radius: 6px; }
"""
_FULL_COLOUR_AT = 2.5  # times as fast, or as slow


def page(rows: Sequence[Row]) -> str:
    """The whole page. Without matplotlib, a note replaces the plot."""
    maps = win_maps(rows)
    body = [*_head(rows), *(part for found in maps for part in _map(found)), *crossover_parts(crossover.maps(rows))]
    body += [*_ceilings(rows), *_plot(rows)]
    body += [*_models(rows), *_skips(rows)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>nybble bench</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _head(rows: Sequence[Row]) -> Iterator[str]:
    yield "<h1>nybble bench</h1>"
    for row in rows:
        if row["kind"] == "run":
            yield f"<pre>{escape(headline(row))}</pre>"


def _map(found: WinMap) -> Iterator[str]:
    won, of = found.score
    yield f"<h2>{escape(found.title)}</h2>"
    yield (
        f"<p>Speed over the best peer of the same weight width, or zeros: at least as fast in {won} of {of} cells. Blue is "
        "faster, orange slower; hover over a cell for the times. “?”: noisy cell.</p>"
    )
    heading = "".join(f"<th>M={m}</th>" for m in found.ms)
    yield f'<div class="scroll"><table><tr><th>scheme</th><th>N × K</th>{heading}</tr>'
    before = None
    for place in found.places:
        yield _map_row(found, place, new=before not in (None, place[0]))
        before = place[0]
    yield "</table></div>"


def _map_row(found: WinMap, place: Place, new: bool) -> str:
    scheme, n, k = place
    extra = " new" if new else ""
    cells = "".join(_cell(found.cells.get((place, m)), extra) for m in found.ms)
    return f'<tr><th class="{extra}">{escape(scheme)}</th><th class="{extra}">{n}×{k}</th>{cells}</tr>'


def _cell(cell: Cell | None, extra: str) -> str:
    if cell is None:
        return f'<td class="{extra}"></td>'
    tip = f"{cell.contestant}: {cell.us:.1f} us, {cell.roofline:.0%} of the {cell.bound} bound"
    if cell.ratio is None:
        return f'<td class="{extra}" title="{escape(tip)}">–</td>'
    tip += f"\nbest peer: {cell.peer}, {cell.us * cell.ratio:.1f} us"
    much = min(1.0, abs(math.log(cell.ratio)) / math.log(_FULL_COLOUR_AT)) if cell.ratio > 0 else 1.0
    side = "win" if cell.ratio >= 1 else "loss"
    return f'<td class="{side}{extra}" style="--much: {much:.0%}" title="{escape(tip)}">{escape(str(cell))}</td>'


def _ceilings(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row["kind"] == "run":
            yield "<h2>Peak rates of this machine</h2>"
            yield from _table(*ceilings.columns(row["ceilings"]))


def _plot(rows: Sequence[Row]) -> Iterator[str]:
    from .report_plot import roofline_png

    if not any(row["kind"] == "result" for row in rows):
        return
    yield "<h2>Roofline</h2>"
    try:
        png = roofline_png(rows)
    except ImportError as error:
        yield f"<p>{escape(str(error))}</p>"
        return
    data = base64.b64encode(png).decode()
    yield f'<img alt="Attained speed against operations per byte" src="data:image/png;base64,{data}">'


def _models(rows: Sequence[Row]) -> Iterator[str]:
    found = model_table(rows)
    if found is not None:
        yield "<h2>Whole model</h2>"
        yield from _table(*found)


def _skips(rows: Sequence[Row]) -> Iterator[str]:
    skipped = dict.fromkeys(f"{row['contestant']}: {row['reason']}" for row in rows if row["kind"] == "skip")
    if skipped:
        yield "<h2>Not run</h2><ul>"
        yield from (f"<li>{escape(text)}</li>" for text in skipped)
        yield "</ul>"


def _table(heading: Iterable[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    cells = "".join(f"<th>{escape(text)}</th>" for text in heading)
    yield f'<div class="scroll"><table><tr>{cells}</tr>'
    for first, *rest in lines:
        yield f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(text)}</td>' for text in rest)}</tr>"
    yield "</table></div>"
