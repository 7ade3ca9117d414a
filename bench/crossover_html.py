"""Crossover maps as HTML tables, coloured by the fastest kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from .crossover import ALTERNATIVES, INT8, Cell, Map
from .crossover_plot import COLOURS, INK


def crossover_parts(maps: Sequence[Map]) -> Iterator[str]:
    """The lines of the section; empty without maps."""
    if not maps:
        return
    yield "<h2>Where sparse weights are fastest</h2>"
    chips = " ".join(f"<span {_paint(who)}>&nbsp;{escape(ALTERNATIVES.get(who, who))}&nbsp;</span>" for who in COLOURS)
    yield f"<p>The fastest: {chips}. The number is the sparse kernel's speed over dense int8; hover for times.</p>"
    for found in maps:
        heading = "".join(f"<th>{100 * zeros:.4g} %</th>" for zeros in found.zeros)
        yield f'<h3>{escape(found.title)}</h3><div class="scroll"><table><tr><th>zeros</th>{heading}</tr>'
        for m in reversed(found.ms):
            cells = "".join(_cell(found.cells.get((zeros, m))) for zeros in found.zeros)
            yield f"<tr><th>M={m}</th>{cells}</tr>"
        yield "</table></div>"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td></td>"
    others = "\n".join(f"{ALTERNATIVES.get(name, name)}: {us:.1f} us" for name, us in cell.others.items())
    speed = cell.over(INT8)
    text = "–" if speed is None else f"{speed:.2f}x{' ?' if cell.noisy else ''}"
    return f'<td {_paint(cell.winner)} title="{escape(f"{cell.us:.1f} us{chr(10)}{others}")}">{text}</td>'


def _paint(who: str) -> str:
    return f'style="background: {COLOURS[who]}; color: {INK}"'
