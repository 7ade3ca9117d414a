"""Win maps: for each scheme, shape and M, the speed of the best nybble kernel over the best peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Place = tuple[str, int, int]  # scheme, N, K


@dataclass(frozen=True)
class Cell:
    """The fastest nybble contestant of a scheme on one problem. ratio: time of the best peer of the same weight width over
    nybble's. ratio and peer are None if no such peer ran."""

    contestant: str
    us: float
    ratio: float | None
    peer: str | None
    bound: str
    roofline: float
    noisy: bool

    def __str__(self) -> str:
        if self.ratio is None:
            return "no peer"
        return f"{self.ratio:.2f}x{' ?' if self.noisy else ''}"


@dataclass(frozen=True)
class WinMap:
    """Results with the same activation dtype, threads and cache state. cells: by place and M."""

    dtype: str
    threads: int
    cache: str
    places: tuple[Place, ...]
    ms: tuple[int, ...]
    cells: Mapping[tuple[Place, int], Cell]

    @property
    def title(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.dtype} activations, {threads}, {self.cache} weights"

    @property
    def score(self) -> tuple[int, int]:
        """(cells at least as fast as the best peer, cells that have a peer)."""
        ratios = [cell.ratio for cell in self.cells.values() if cell.ratio is not None]
        return sum(ratio >= 1 for ratio in ratios), len(ratios)


def win_maps(rows: Sequence[Row]) -> list[WinMap]:
    """One map per setting in the results, in their order. Results of a crossover are left to crossover.maps."""
    ours = [row for row in rows if row["kind"] == "result" and not row["peer"] and "series" not in row]
    settings = dict.fromkeys((row["dtype"], row["threads"], row["cache"]) for row in ours)
    return [_map(setting, [row for row in ours if _setting(row) == setting]) for setting in settings]


def _setting(row: Row) -> tuple[str, int, str]:
    return row["dtype"], row["threads"], row["cache"]


def _map(setting: tuple[str, int, str], rows: Sequence[Row]) -> WinMap:
    best: dict[tuple[Place, int], Row] = {}
    for row in rows:
        key = (row["scheme"], row["n"], row["k"]), row["m"]
        if key not in best or row["us"] < best[key]["us"]:
            best[key] = row
    known = {place for place, _ in best}
    # In the order of the run.
    schemes = dict.fromkeys(scheme for (scheme, _, _), _ in best)
    shapes = dict.fromkeys((n, k) for (_, n, k), _ in best)
    return WinMap(
        *setting,
        places=tuple((scheme, n, k) for scheme in schemes for n, k in shapes if (scheme, n, k) in known),
        ms=tuple(sorted({m for _, m in best})),
        cells={key: _cell(row) for key, row in best.items()},
    )


def _cell(row: Row) -> Cell:
    return Cell(
        contestant=row["contestant"],
        us=row["us"],
        ratio=row["vs_peer"],
        peer=row["best_peer"],
        bound=row["bound"],
        roofline=row["roofline"],
        noisy=row["noisy"],
    )
