"""``python -m nybble.bench report``: shows a result file as text, roofline plot and HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..demo.table import text_table
from . import atomic, ceilings, crossover
from .report_cells import Row, WinMap, win_maps
from .report_html import page
from .report_rows import headline, model_table, of_kind
from .whole import lines, show


def report(rows: Sequence[Row], html: Path | None = None, png: Path | None = None) -> str:
    """The results as text; also writes an HTML page or a plot if requested, atomically.

    Raises:
        ValueError: there are no results.
        ImportError: a plot is requested, and matplotlib is not installed.
        OSError: a file cannot be written.
    """
    maps = win_maps(rows)
    crossings = crossover.maps(rows)
    if not maps and not crossings and not of_kind(rows, "model") and not lines.models(rows):
        raise ValueError("no results: nothing to report")
    if png is not None:
        atomic.write(png, _png(rows, crossings), 0o644)
    if html is not None:
        atomic.write(html, page(rows).encode(), 0o644)
    return "\n\n".join(_parts(rows, maps))


def _png(rows: Sequence[Row], crossings: Sequence[crossover.Map]) -> bytes:
    from .crossover_plot import crossover_png
    from .report_plot import roofline_png

    if not crossings:
        return roofline_png(rows)
    return crossover_png(crossings, ", ".join(f"{run['cpu']}, {run['date'][:10]}" for run in of_kind(rows, "run")))


def _parts(rows: Sequence[Row], maps: Sequence[WinMap]) -> Iterator[str]:
    for run in of_kind(rows, "run"):
        yield headline(run)
        yield ceilings.table(run["ceilings"])
    for found in maps:
        won, of = found.score
        yield f"{found.title}: at least as fast as the best peer of the same weight width, or zeros, in {won} of {of} cells"
        yield text_table(("scheme", "N x K", *(f"M={m}" for m in found.ms)), list(_map_rows(found)))
    if any(cell.noisy for found in maps for cell in found.cells.values()):
        yield "?: noisy cell: timing the same contestant twice differed by more than 5 %"
    models = model_table(rows)
    if models:
        yield text_table(*models, right=range(1, len(models[0])))
    yield from show.tables(rows, show.plain)
    skipped = dict.fromkeys(f"not run: {row['contestant']}: {row['reason']}" for row in of_kind(rows, "skip"))
    if skipped:
        yield "\n".join(skipped)


def _map_rows(found: WinMap) -> Iterator[tuple[str, ...]]:
    for place in found.places:
        scheme, n, k = place
        cells = (found.cells.get((place, m)) for m in found.ms)
        yield scheme, f"{n}x{k}", *("" if cell is None else str(cell) for cell in cells)
