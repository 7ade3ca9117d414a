"""A progress bar on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(total: int, wanted: bool) -> Iterator[Callable[[str], None]]:
    """Yield ``advance(label)``; it shows a bar of so many steps where one is wanted and rich is installed."""
    if wanted:
        try:
            from rich.console import Console
            from rich.progress import Progress
        except ImportError:
            wanted = False
    if not wanted:
        yield lambda label: None
        return
    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda label: shown.update(task, advance=1, description=label)
