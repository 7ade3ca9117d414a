"""The table of a report: its columns, and the notes below it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..text import Items, Table, span
from .data import LayerReport
from .fold import Row

NONE = "-"


def size(count: int) -> str:
    """Bytes in the unit that fits."""
    number = float(count)
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{count} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


@dataclass(frozen=True)
class Column:
    """What a column shows of the layers of a row. It is left out where it shows nothing of any row.

    ``starts``: a table that is too wide is cut before this column.
    """

    header: str
    cell: Callable[[Sequence[LayerReport]], str]
    is_left: bool = False
    starts: bool = False


def _first(value: Callable[[LayerReport], str]) -> Callable[[Sequence[LayerReport]], str]:
    """Of what is equal in a row."""
    return lambda layers: value(layers[0])


def _spanned(value: Callable[[LayerReport], float | None], form: str) -> Callable[[Sequence[LayerReport]], str]:
    """The range of a number."""

    def cell(layers: Sequence[LayerReport]) -> str:
        values = [found for layer in layers if (found := value(layer)) is not None]
        return span(values, form) if values else NONE

    return cell


def _bytes(layers: Sequence[LayerReport]) -> str:
    """ "387.0 -> 105.0 KiB", or each with its unit where these differ."""
    before = size(sum(layer.nbytes_before for layer in layers))
    after = size(sum(layer.nbytes_after for layer in layers))
    number, unit = before.split()
    return f"{number if after.endswith(f' {unit}') else before} -> {after}"


def _errors(layers: Sequence[LayerReport]) -> str:
    """ "1.20 -> 0.80", in percent: by rounding alone, and as the layer is now."""
    cells = [_spanned(lambda layer, of=of: _percent(of(layer)), ".2f")(layers) for of in (_error_of_rounding, error_of)]  # type: ignore[misc]
    return NONE if set(cells) == {NONE} else " -> ".join(cells)


def _mean(layers: Sequence[LayerReport]) -> str:
    """ "1.42x [1.37, 1.48]"; of several layers the range of the ratios, and the ends that hold all intervals."""
    means = [layer.mean_speed for layer in layers if layer.mean_speed is not None]
    if not means:
        return NONE
    ratios = span([mean.ratio for mean in means], ".2f")
    return f"{ratios}x [{min(mean.low for mean in means):.2f}, {max(mean.high for mean in means):.2f}]"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def method_of(layer: LayerReport) -> str | None:
    """The method that made the weight, where the report's own method does not say it all."""
    if layer.pruned is not None:
        return layer.pruned.method
    return layer.rounded.method if layer.rounded is not None and layer.rounded.error is not None else None


def error_of(layer: LayerReport) -> float | None:
    """Relative output error on data that was held out."""
    made = layer.pruned or layer.rounded
    return None if made is None else made.error


def _error_of_rounding(layer: LayerReport) -> float | None:
    if layer.pruned is not None:
        return layer.pruned.error_dense
    return layer.rounded.error_rtn if layer.rounded is not None and layer.rounded.error is not None else None


def _kernel(layers: Sequence[LayerReport]) -> str:
    first, *more = (layers[0].kernel or NONE).split(", ")
    return f"{first} +{len(more)}" if more else first


def columns(ms: Iterable[int], one_kernel: bool) -> list[Column]:
    """The columns of a report that timed these M; without the kernels where all layers have the same one."""
    speeds = [Column(f"M={m}", _spanned(lambda layer, m=m: layer.speedup.get(m), ".2f")) for m in ms]  # type: ignore[misc]
    return [
        Column("n", lambda layers: f"{len(layers)}x" if len(layers) > 1 else NONE),
        Column("kind", _first(lambda layer: layer.kind), is_left=True),
        Column("shape", _first(lambda layer: "x".join(map(str, layer.shape)))),
        Column("before", _first(lambda layer: layer.before), is_left=True),
        Column("after", _first(lambda layer: layer.after if layer.swapped else NONE), is_left=True),
        Column("bytes", _bytes),
        Column("SQNR dB", _spanned(lambda layer: layer.sqnr_db, ".1f")),
        *([] if one_kernel else [Column("kernel", _kernel, is_left=True, starts=True)]),
        Column(
            "kept %", _spanned(lambda layer: _percent(layer.pruned.kept if layer.pruned else None), ".2f"), starts=True
        ),
        Column("method", _first(lambda layer: method_of(layer) or NONE), is_left=True, starts=True),
        Column("error %", _errors),
        *(Column(speed.header, speed.cell, starts=i == 0) for i, speed in enumerate(speeds)),
        Column("mean", _mean),
        Column("pairs", _spanned(lambda layer: None if layer.mean_speed is None else layer.mean_speed.pairs, ".0f")),
    ]


def drawn(rows: Sequence[Row], ms: Iterable[int]) -> tuple[Table, Items | None]:
    """The table, each name followed by the numbers of its notes, and these notes."""
    numbers: dict[str, int] = {}
    names = []
    for row in rows:
        marks = [f"[{numbers.setdefault(note, len(numbers) + 1)}]" for note in row.notes]
        names.append(" ".join((row.name, *marks)))
    kernels = {layer.kernel for row in rows for layer in row.layers} - {None}
    shown = []
    for column in columns(ms, one_kernel=len(kernels) <= 1):
        cells = [column.cell(row.layers) for row in rows]
        if any(cell != NONE for cell in cells):
            shown.append((column, cells))
    header = ["layer", *(column.header for column, _ in shown)]
    lines = [[name, *(cells[i] for _, cells in shown)] for i, name in enumerate(names)]
    left = [0, *(i for i, (column, _) in enumerate(shown, 1) if column.is_left)]
    cuts = [i for i, (column, _) in enumerate(shown, 1) if column.starts]
    notes = Items("", [(f"[{number}] ", note) for note, number in numbers.items()]) if numbers else None
    return Table([header, *lines], left, cuts), notes
