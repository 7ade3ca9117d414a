"""A progress bar on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from ..text import WIDTH, shorten

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
    is later than two seconds from the start. Without the package rich it is a line that is written over; where stderr is
    no terminal nothing is shown.
    """
    if not (wanted or (wanted is None and is_terminal())):
        yield lambda label, steps=1: None
        return
    shown: _Rich | _Line = _rich(total) or _Line(total)
    start = monotonic()

    def advance(label: str, steps: int = 1) -> None:
        shown.count(shorten(label, _LABEL), steps)
        if not shown.started and monotonic() - start >= PATIENCE_S:
            shown.start()
        if shown.started:
            shown.refresh()

    try:
        if wanted:
            shown.start()
        yield advance
    finally:
        if shown.started:
            shown.stop()


def is_terminal() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


class _Line:
    """Label and count in one line of a terminal, written over."""

    def __init__(self, total: int) -> None:
        self.started, self._label, self._done, self._total = False, "", 0, total

    def count(self, label: str, steps: int) -> None:
        self._label, self._done = label, self._done + steps

    def start(self) -> None:
        self.started = is_terminal()

    def refresh(self) -> None:
        self._write(f"{self._label} {self._done}/{self._total}")

    def stop(self) -> None:
        self._write("", end="\r")

    def _write(self, text: str, end: str = "") -> None:
        print(f"\r{text:{WIDTH // 2}}", end=end, file=sys.stderr, flush=True)


class _Rich:
    """A bar of rich."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._task = progress, progress.add_task("", total=total)

    @property
    def started(self) -> bool:
        return self._progress.live.is_started

    def count(self, label: str, steps: int) -> None:
        self._progress.update(self._task, advance=steps, description=label)

    def start(self) -> None:
        self._progress.start()

    def refresh(self) -> None:
        self._progress.refresh()

    def stop(self) -> None:
        self._progress.stop()


def _rich(total: int) -> _Rich | None:
    """A bar that is not shown yet, or None if rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # No refresh thread, since it would disturb the passes' timings.
    return _Rich(Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True), total)
