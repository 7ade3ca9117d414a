"""``--preset sparse-crossover``: from which sparsity on sparse kernels are faster than dense ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log
from typing import Any

from .peers.torch_dense import BF16
from .weights import WeightKind

Row = Mapping[str, Any]

MS = (1, 4, 16, 64, 256, 512)
INT8, INT4 = "w8a8", "w4a8g128"
# The kinds of weight that are timed together, with the dense kernels and torch bf16.
SERIES = {
    "unstructured int8": tuple(f"sp{percent}w8a8" for percent in (30, 40, 50, 60, 70, 80, 90, 95, 98)),
    "n:128 int8": tuple(f"sp{n}of128w8a8" for n in (64, 48, 32, 16, 8, 4)),
    "2:4 int8": ("sp24w8a8",),
    "blocks of 32x32 int8": tuple(f"bs32x32w8a8:{percent}%" for percent in (30, 50, 75, 90, 95, 98)),
    "unstructured int4": tuple(f"sp{percent}w4a8g128" for percent in (30, 50, 70, 80, 90, 98)),
}
# Dense alternatives: scheme or peer -> label.
SPARSE = "sparse"
ALTERNATIVES = {INT8: "dense int8", INT4: "dense int4", BF16: BF16}


@dataclass(frozen=True)
class Cell:
    """One kind of weight at one M. us: time of the sparse kernel. others: times of the dense alternatives, by key of
    ALTERNATIVES, and of other kernels for the same weight, by name."""

    us: float
    others: Mapping[str, float]
    noisy: bool

    @property
    def winner(self) -> str:
        """The fastest: SPARSE or a key of ALTERNATIVES."""
        times = {SPARSE: self.us, **{name: us for name, us in self.others.items() if name in ALTERNATIVES}}
        return min(times, key=times.__getitem__)

    def over(self, other: str) -> float | None:
        """Speed over another one's; None if that did not run."""
        return self.others[other] / self.us if other in self.others else None


@dataclass(frozen=True)
class Map:
    """Results of a kernel on a series of weights of shape (n, k). cells: by share of zeros and M."""

    series: str
    contestant: str
    n: int
    k: int
    cells: Mapping[tuple[float, int], Cell]

    @property
    def title(self) -> str:
        return f"{self.series}, {self.contestant}, {self.n}x{self.k}"

    @property
    def zeros(self) -> tuple[float, ...]:
        return tuple(sorted({zeros for zeros, _ in self.cells}))

    @property
    def ms(self) -> tuple[int, ...]:
        return tuple(sorted({m for _, m in self.cells}))

    def pays(self, m: int, over: str) -> str:
        """The share of zeros from which it is faster than another at M = m, as text: "60%"; "<= 30%" if the lowest share
        measured is already faster; "-" if none is."""
        cells = ((zeros, self.cells[zeros, m].over(over)) for zeros in self.zeros if (zeros, m) in self.cells)
        points = [(zeros, speed) for zeros, speed in cells if speed is not None]
        found = pays_from(points)
        if found is None:
            return "-"
        return f"{'<= ' if found == points[0][0] else ''}{found:.0%}"


def pays_from(points: Sequence[tuple[float, float]]) -> float | None:
    """The lowest share of zeros from which on all points are faster.

    points: (share of zeros, speed over the other), ascending. Interpolates the logarithm of the speed between the last
    slower point and the next one. The first share if all points are faster; None if the last one is slower.
    """
    lost = [i for i, (_, speed) in enumerate(points) if speed < 1]
    if not points or (lost and lost[-1] == len(points) - 1):
        return None
    if not lost:
        return points[0][0]
    (left, slow), (right, fast) = points[lost[-1]], points[lost[-1] + 1]
    return left + (right - left) * log(1 / slow) / log(fast / slow)


def maps(rows: Sequence[Row]) -> list[Map]:
    """One map per shape, series and kernel in the results of the preset, in their order."""
    races: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if row["kind"] == "result" and "series" in row:
            races.setdefault((row["series"], row["n"], row["k"]), []).append(row)
    return [found for (series, n, k), race in races.items() for found in _maps(series, (n, k), race)]


def _maps(series: str, shape: tuple[int, int], race: Sequence[Row]) -> Iterator[Map]:
    cells: dict[str, dict[tuple[float, int], Cell]] = {}
    for m, group in groupby(sorted(race, key=lambda row: int(row["m"])), key=lambda row: int(row["m"])):
        contestants = list(group)
        dense = {row["scheme"] or row["contestant"]: row["us"] for row in contestants if row["pattern"] is None}
        for row in (row for row in contestants if row["pattern"] is not None):
            same = [other for other in contestants if other["scheme"] == row["scheme"] and other is not row]
            others = {**dense, **{other["contestant"]: other["us"] for other in same}}
            cells.setdefault(row["contestant"], {})[_zeros(row), m] = Cell(row["us"], others, row["noisy"])
    return (Map(series, contestant, *shape, found) for contestant, found in cells.items())


def _zeros(row: Row) -> float:
    pattern = WeightKind.parse(row["scheme"]).pattern
    assert pattern is not None, "rows of sparse weights"  # noqa: S101
    return pattern.zeros


def table(found: Sequence[Map]) -> str:
    """A markdown table of the share of zeros from which each kernel is faster, for each M."""
    ms = sorted({m for one in found for m in one.ms})
    lines = [
        (one.title, ALTERNATIVES.get(over, over), *(one.pays(m, over) for m in ms))
        for one in found
        for over in _overs(one)
    ]
    headers = ("weights, kernel, shape", "faster than", *(f"M={m}" for m in ms))
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in (headers, ("---",) * len(headers), *lines))
    legend = (
        "Share of zeros from which the sparse kernel is faster, interpolated. <=: already faster at the lowest share "
        "measured; -: slower even at the highest."
    )
    return f"{legend}\n\n{drawn}"


def _overs(one: Map) -> tuple[str, ...]:
    """The alternatives to compare with: dense int8, the dense kernel of the same width, and other sparse layouts."""
    others = dict.fromkeys(name for cell in one.cells.values() for name in cell.others)
    own = (INT4,) if "int4" in one.series else ()
    return (INT8, *own, *(name for name in others if name not in ALTERNATIVES and name < one.contestant))
