"""What reports have in common: each is made of parts, which are printed, or shown as HTML in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from .lines import wrap
from .table import Table

DASH = "- "


@dataclass(frozen=True)
class Items:
    """A title, and below it lines, each a mark and a text that is wrapped beside it."""

    title: str
    items: Sequence[tuple[str, str]]

    @staticmethod
    def dashed(title: str, lines: Iterable[str]) -> Items:
        """A list with a dash before each line."""
        return Items(title, [(DASH, line) for line in lines])

    def lines(self) -> list[str]:
        """The lines as they are printed."""
        title = wrap(self.title) if self.title else []
        return [*title, *(line for mark, text in self.items for line in wrap(text, f"  {mark}"))]

    def html(self) -> str:
        """The same as a paragraph and a list."""
        title = f"<p>{escape(self.title)}</p>\n" if self.title else ""
        lines = (" ".join(f"{'' if mark == DASH else mark} {text}".split()) for mark, text in self.items)
        return title + "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>"


# A string is a paragraph.
Part = str | Table | Items


class Shown:
    """Has a text of lines of at most 120 columns, and an HTML form, of the parts that its class gives."""

    def parts(self) -> Sequence[Part]:
        """What there is to show, in order."""
        raise NotImplementedError

    def __str__(self) -> str:
        return text_of(self.parts())

    def _repr_html_(self) -> str:
        return "\n".join(f"<p>{escape(part)}</p>" if isinstance(part, str) else part.html() for part in self.parts())


def text_of(parts: Sequence[Part]) -> str:
    """Paragraphs below one another, and a blank line around tables and lists."""
    lines: list[str] = []
    for i, part in enumerate(parts):
        if i and not (isinstance(part, str) and isinstance(parts[i - 1], str)):
            lines.append("")
        lines += wrap(part, rest="  ") if isinstance(part, str) else part.lines()
    return "\n".join(lines)
