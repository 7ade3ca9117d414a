"""Text that fits a number of columns."""

from __future__ import annotations

import textwrap
from collections.abc import Collection

WIDTH = 120
_CUT = "..."


def shorten(text: str, width: int) -> str:
    """The text in at most so many characters: a longer one loses its middle."""
    if len(text) <= width:
        return text
    if width <= len(_CUT):
        return text[:width]
    tail = (width - len(_CUT)) // 2
    return f"{text[: width - len(_CUT) - tail]}{_CUT}{text[len(text) - tail :]}"


def wrap(text: str, first: str = "", rest: str | None = None, width: int = WIDTH) -> list[str]:
    """The lines of a paragraph. ``first`` comes before the first line, ``rest`` (else as many blanks) before the others."""
    rest = " " * len(first) if rest is None else rest
    lines = textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return lines or [first.rstrip()]


def span(values: Collection[float], form: str) -> str:
    """The least and the largest number, formatted: "1.32-1.41", or one number where both look alike."""
    least, most = format(min(values), form), format(max(values), form)
    if least == most:
        return least
    return f"{least} to {most}" if least.startswith("-") else f"{least}-{most}"
