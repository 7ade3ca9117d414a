"""Tables and a progress bar for the terminal: rich where there is one, plain text where the output is piped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Rows = Sequence[Sequence[str]]


def text_table(headers: Sequence[str], rows: Rows, right: Sequence[int] = ()) -> str:
    """Columns two spaces apart under a rule; `right` lists the columns set to the right."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        set_cells = (
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(set_cells).rstrip()

    return "\n".join([line(headers), "  ".join("-" * w for w in widths), *map(line, rows)])


def show_table(headers: Sequence[str], rows: Rows, right: Sequence[int] = ()) -> None:
    """Print to stdout."""
    text = text_table(headers, rows, right)
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            print(text)
            return
        console = Console()
        # A table that does not fit would be folded cell by cell: then plain lines read better.
        if console.width >= max(map(len, text.splitlines())) + 3 * len(headers):
            table = Table()
            for i, header in enumerate(headers):
                table.add_column(header, justify="right" if i in right else "left", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            console.print(table)
            return
    print(text)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; yields `advance(label)`. Without a terminal or without rich, nothing is shown."""
    bar = None
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        except ImportError:
            pass
        else:
            columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
            # No refresh thread: it would take time from what is being measured.
            bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
    if bar is None:
        yield lambda label: None
        return
    with bar:
        task = bar.add_task("", total=total)

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=label, refresh=True)

        yield advance
