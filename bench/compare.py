"""``compare A B``: compares two result files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..demo.table import text_table

Row = Mapping[str, Any]

_KEY = ("contestant", "scheme", "dtype", "m", "n", "k", "threads", "cache")


@dataclass(frozen=True)
class Change:
    """One contestant in one cell of both files. ratio: time after over time before."""

    key: tuple[Any, ...]
    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        return float(self.after["us"] / self.before["us"])

    @property
    def real(self) -> bool:
        """Whether it is significant: above both A/A spreads, and each median outside the other's p10 to p90."""
        spread = max(self.before["spread"], self.after["spread"])
        apart = max(self.ratio, 1 / self.ratio) > 1 + spread
        pairs = ((self.before, self.after), (self.after, self.before))
        return apart and all(not one["us_p10"] <= other["us"] <= one["us_p90"] for one, other in pairs)

    @property
    def result(self) -> str:
        return ("slower" if self.ratio > 1 else "faster") if self.real else ""


def changes(before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """The results in both files, in the order of the first."""
    later = {_key(row): row for row in after if row["kind"] == "result"}
    return [Change(_key(row), row, later[_key(row)]) for row in before if _key(row) in later]


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _KEY) if row["kind"] == "result" else ()


def too_slow(found: Sequence[Change], percent: float) -> list[Change]:
    """Results of nybble that are significantly slower, by more than `percent`. Other libraries are ignored."""
    return [
        change for change in found if not change.before["peer"] and change.real and change.ratio > 1 + percent / 100
    ]


def text(found: Sequence[Change]) -> str:
    """A table with one line per change."""
    headers = ("contestant", "scheme", "dtype", "m", "n x k", "threads", "cache", "us before", "after", "ratio", "")
    lines = []
    for change in found:
        contestant, scheme, dtype, m, n, k, threads, cache = change.key
        times = (f"{change.before['us']:.1f}", f"{change.after['us']:.1f}", f"{change.ratio:.3f}", change.result)
        lines.append((contestant, scheme or "", dtype, str(m), f"{n}x{k}", str(threads), cache, *times))
    return text_table(headers, lines, right=(3, 5, 7, 8, 9))
