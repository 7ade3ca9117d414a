"""How far a run is, on stderr: a bar on a terminal, else a line after each step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from ..model.bar import bar


@contextmanager
def steps(total: int) -> Iterator[Callable[[str], None]]:
    """Yields what is to be called after each of `total` steps with its name."""
    if sys.stderr.isatty():
        with bar(total) as advance:
            yield advance
    else:
        yield _lines(total)


def _lines(total: int) -> Callable[[str], None]:
    done, start = 0, monotonic()

    def advance(label: str) -> None:
        nonlocal done
        done += 1
        print(f"{done} of {total} after {monotonic() - start:.0f} s: {label}", file=sys.stderr, flush=True)

    return advance
