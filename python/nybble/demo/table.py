"""Tables for the terminal: drawn by rich if it is installed, plain text if the output is piped."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..text import WIDTH, Table

Rows = Sequence[Sequence[str]]


def text_table(headers: Sequence[str], rows: Rows, right: Sequence[int] = (), width: int | None = None) -> str:
    """A plain-text table; `right` lists the right-aligned columns. `width`: lines are shortened to it."""
    left = [i for i in range(len(headers)) if i not in right]
    return "\n".join(Table([headers, *rows], left, width=width).lines())


def markdown_table(headers: Sequence[str], rows: Rows) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (headers, ("---",) * len(headers), *rows))


def show_table(headers: Sequence[str], rows: Rows, right: Sequence[int] = ()) -> None:
    """Print a table to stdout."""
    text = text_table(headers, rows, right, WIDTH)
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table as RichTable
        except ImportError:
            print(text)
            return
        console = Console()
        # rich would wrap the cells of a table that is too wide; plain lines are easier to read then.
        if console.width >= max(map(len, text_table(headers, rows, right).splitlines())) + 3 * len(headers):
            table = RichTable()
            for i, header in enumerate(headers):
                table.add_column(header, justify="right" if i in right else "left", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            console.print(table)
            return
    print(text)
