"""Text that fits a number of columns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection

WIDTH = 120
_CUT = "..."
# A component of a module's name, with the dot after it; dots within braces belong to it.
_COMPONENT = re.compile(r"(?:\{[^{}]*\}|[^.])+\.?|\.")


def shorten(text: str, width: int) -> str:
    """The text in at most ``width`` characters: a longer one loses its middle."""
    if len(text) <= width:
        return text
    if width <= len(_CUT):
        return text[:width]
    tail = (width - len(_CUT)) // 2
    return f"{text[: width - len(_CUT) - tail]}{_CUT}{text[len(text) - tail :]}"


def break_name(name: str, width: int) -> list[str]:
    """The lines of a module's name such as "layers.{0..11}.fc", broken after dots.

    Dots within braces do not count. Only a component that is wider than a line is broken where the line ends.
    """
    lines = [""]
    for part in _COMPONENT.findall(name):
        if len(lines[-1]) + len(part) <= width:
            lines[-1] += part
        else:
            lines += [part[i : i + width] for i in range(0, len(part), width)]
    return [line for line in lines if line] or [""]


def wrap(text: str, first: str = "", rest: str | None = None, width: int = WIDTH) -> list[str]:
    """The lines of a paragraph. ``first`` begins the first line, ``rest`` the others; None: blanks as wide as ``first``."""
    rest = " " * len(first) if rest is None else rest
    lines = textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return lines or [first.rstrip()]


def span(values: Collection[float], form: str) -> str:
    """The least and the largest number, formatted: "1.32-1.41", or one number where both look alike."""
    least, most = format(min(values), form), format(max(values), form)
    if least == most:
        return least
    return f"{least} to {most}" if least.startswith("-") else f"{least}-{most}"
