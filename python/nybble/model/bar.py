"""A progress bar on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from ..text import shorten

if TYPE_CHECKING:
    from rich.progress import Progress


class Advance(Protocol):
    """Counts finished steps, one by default, and shows a label."""

    def __call__(self, label: str, steps: int = 1, /) -> None: ...


# By default, work that takes less time than this shows no bar.
PATIENCE_S = 2.0
_LABEL = 40  # columns


@contextmanager
def bar(total: int, wanted: bool | None = None) -> Iterator[Advance]:
    """Yield ``advance(label)``, to be called after each of ``total`` steps; ``advance(label, 0)`` tells of a part of one.

    ``wanted``: True shows a bar at once, False never. None shows one if stderr is a terminal, after the first call that
    is later than two seconds from the start. Without the package rich there is no bar.
    """
    progress = _progress() if wanted or (wanted is None and _is_terminal()) else None
    if progress is None:
        yield lambda label, steps=1: None
        return
    task = progress.add_task("", total=total)
    start = monotonic()

    def advance(label: str, steps: int = 1) -> None:
        progress.update(task, advance=steps, description=shorten(label, _LABEL))
        if not progress.live.is_started and monotonic() - start >= PATIENCE_S:
            progress.start()
        if progress.live.is_started:
            progress.refresh()

    try:
        if wanted:
            progress.start()
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _progress() -> Progress | None:
    """A rich progress bar that is not shown yet, or None if rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # No refresh thread, since it would disturb the passes' timings.
    return Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
