"""``python -m nybble.bench report``: a file of results as text, a roofline plot and a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..demo.table import text_table
from . import atomic, ceilings, crossover
from .report_cells import Row, WinMap, win_maps

# Key of a line of kind "model", its heading and how it is written.
MODEL_COLUMNS = {
    "decode_tokens_s": ("decode tokens/s", ".1f"),
    "prefill_tokens_s": ("prefill tokens/s", ".0f"),
    "decode_outside_ms": ("not linear, ms", ".1f"),
    "prefill_outside_ms": ("in prefill, ms", ".0f"),
    "weights_mb": ("weights MB", ".0f"),
    "peak_mb": ("peak MB", ".0f"),
}


def report(rows: Sequence[Row], html: Path | None = None, png: Path | None = None) -> str:
    """The results as text; writes a page or a plot where asked, each whole or not at all.

    Raises:
        ValueError: the lines hold no result and no model.
        ImportError: a plot is asked for, and matplotlib is not installed.
        OSError: a file cannot be written.
    """
    maps = win_maps(rows)
    crossings = crossover.maps(rows)
    if not maps and not crossings and not _of(rows, "model"):
        raise ValueError("no results: nothing to report")
    if png is not None:
        atomic.write(png, _png(rows, crossings), 0o644)
    if html is not None:
        from .report_html import page

        atomic.write(html, page(rows).encode(), 0o644)
    return "\n\n".join(_parts(rows, maps))


def _png(rows: Sequence[Row], crossings: Sequence[crossover.Map]) -> bytes:
    from .crossover_plot import crossover_png
    from .report_plot import roofline_png

    if not crossings:
        return roofline_png(rows)
    return crossover_png(crossings, ", ".join(f"{run['cpu']}, {run['date'][:10]}" for run in _of(rows, "run")))


def _of(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _parts(rows: Sequence[Row], maps: Sequence[WinMap]) -> Iterator[str]:
    for run in _of(rows, "run"):
        yield headline(run)
        yield ceilings.table(run["ceilings"])
    for found in maps:
        won, of = found.score
        yield f"{found.title}: at least as fast as the best peer of the same weight width, or zeros, in {won} of {of} cells"
        yield text_table(("scheme", "N x K", *(f"M={m}" for m in found.ms)), list(_map_rows(found)))
    if any(cell.noisy for found in maps for cell in found.cells.values()):
        yield "?: the A/A spread of this cell was above the bench's bound"
    models = model_table(rows)
    if models:
        yield text_table(*models, right=range(1, len(models[0])))
    skipped = dict.fromkeys(f"not run: {row['contestant']}: {row['reason']}" for row in _of(rows, "skip"))
    if skipped:
        yield "\n".join(skipped)


def headline(run: Row) -> str:
    """Where, when and of what the results are."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"{run['cpu']}, {run['date']}, commit {run['commit'] or 'unknown'}\n{versions}"


def _map_rows(found: WinMap) -> Iterator[tuple[str, ...]]:
    for place in found.places:
        scheme, n, k = place
        cells = (found.cells.get((place, m)) for m in found.ms)
        yield scheme, f"{n}x{k}", *("" if cell is None else str(cell) for cell in cells)


def model_table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Heading and lines of the whole-model results; None without any."""
    models = _of(rows, "model")
    if not models:
        return None
    columns = {key: column for key, column in MODEL_COLUMNS.items() if all(key in row for row in models)}
    lines = [
        (row["contestant"], str(row["threads"]), *(format(row[key], how) for key, (_, how) in columns.items()))
        for row in models
    ]
    return ("model", "threads", *(heading for heading, _ in columns.values())), lines
