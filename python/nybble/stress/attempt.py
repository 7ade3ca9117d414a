"""Something that must not raise, or only what it may: whatever it raises else is a failure to be told."""

from __future__ import annotations

import traceback
from collections.abc import Callable


def wrong_of(function: Callable[[], object], where: str) -> str | None:
    """What a call raised, and where; None: nothing."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 whatever it is, it is what a figure counts
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{where}: {type(error).__name__}: {str(error)[:500]} ({frame.filename}:{frame.lineno})"
    return None


def must(holds: bool, message: str) -> None:
    """Raise RuntimeError where something does not hold."""
    if not holds:
        raise RuntimeError(message)
