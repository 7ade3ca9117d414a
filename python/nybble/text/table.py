"""Tables: columns two blanks apart under a rule."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

from .lines import WIDTH, break_name, shorten

_GAP = "  "
_KEY = 44  # columns that the first one keeps before a table is cut
_CELL = 40  # the most that any other one takes
_NOTHING = ("", "-")


@dataclass(frozen=True)
class Table:
    """Rows of cells, the header first; ``left`` holds the numbers of the columns that are set to the left.

    A table wider than ``width`` is cut into several, one below the other, each with the first column and the rows that have
    something there: before the columns in ``cuts`` where that helps, else wherever the width ends. Where the first column is
    still too wide, its names are broken into several lines; other cells lose their middle. With ``width`` None nothing is
    cut.
    """

    rows: Sequence[Sequence[str]]
    left: Collection[int] = (0,)
    cuts: Collection[int] = ()
    width: int | None = WIDTH

    def lines(self) -> list[str]:
        """The table as text."""
        rows = [[" ".join(cell.splitlines()) for cell in row] for row in self.rows]
        columns = range(1, len(rows[0]))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        if self.width is None:
            return self._draw(rows, [0, *columns], widths)
        widths = [widths[0], *(min(width, _CELL) for width in widths[1:])]
        lines: list[str] = []
        for part in self._parts(widths):
            rest = sum(widths[i] + len(_GAP) for i in part)
            key = min(widths[0], self.width - rest)
            filled = [row for row in rows[1:] if not lines or any(row[i] not in _NOTHING for i in part)]
            lines += ["", *self._draw([rows[0], *filled], [0, *part], [key, *widths[1:]])]
        return lines[1:]

    def _parts(self, widths: Sequence[int]) -> list[list[int]]:
        """The columns, without the first, of each table that this one is cut into."""
        assert self.width is not None, "there is something to fit into"  # noqa: S101
        room = self.width - min(widths[0], _KEY)
        parts: list[list[int]] = [[]]
        for group in self._groups(len(widths)):
            if parts[-1] and sum(widths[i] + len(_GAP) for i in parts[-1] + group) > room:
                parts.append([])
            for i in group:
                if parts[-1] and sum(widths[j] + len(_GAP) for j in [*parts[-1], i]) > room:
                    parts.append([])
                parts[-1].append(i)
        return parts

    def _groups(self, count: int) -> list[list[int]]:
        """The columns between two cuts."""
        groups: list[list[int]] = [[]]
        for i in range(1, count):
            if i in self.cuts:
                groups.append([])
            groups[-1].append(i)
        return groups

    def _draw(self, rows: Sequence[Sequence[str]], columns: Sequence[int], widths: Sequence[int]) -> list[str]:
        lines = []
        for row in rows:
            first, *more = break_name(row[0], widths[0])
            cells = [(0, first), *((i, shorten(row[i], widths[i])) for i in columns[1:])]
            set_cells = [cell.ljust(widths[i]) if i in self.left else cell.rjust(widths[i]) for i, cell in cells]
            lines += [_GAP.join(set_cells).rstrip(), *more]
        return [lines[0], _GAP.join("-" * widths[i] for i in columns), *lines[1:]]

    def html(self) -> str:
        """The table as HTML, with every cell whole."""
        lines = ["<table>"]
        for tag, row in (("th", self.rows[0]), *(("td", row) for row in self.rows[1:])):
            cells = (
                f'<{tag} style="text-align:{"left" if i in self.left else "right"}">{escape(cell)}</{tag}>'
                for i, cell in enumerate(row)
            )
            lines.append(f"<tr>{''.join(cells)}</tr>")
        return "\n".join([*lines, "</table>"])
