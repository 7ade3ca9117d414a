"""Which line of the user's code a warning points to."""

from __future__ import annotations

import inspect

_PREFIX = f"{__name__.rpartition('.')[0]}."


def outside_level() -> int:
    """The ``stacklevel`` with which the caller's warning points to the first frame outside this package."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and f"{frame.f_globals.get('__name__')}.".startswith(_PREFIX):
        frame, level = frame.f_back, level + 1
    return level
