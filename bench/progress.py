"""A bar on stderr with the time that remains; nothing where stderr is no terminal or rich is not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields `advance(label)`, to be called as each of `total` steps is done."""
    if not sys.stderr.isatty():
        yield lambda label: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda label: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # No refresh thread: it would take time from what is being measured.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task = bar.add_task("building", total=total)

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=label, refresh=True)

        yield advance
