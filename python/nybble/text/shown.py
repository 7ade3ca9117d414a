"""What reports have in common: each is made of blocks, which are printed, or shown as HTML in a notebook."""

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
    lines: Sequence[tuple[str, str]]

    @staticmethod
    def dashed(title: str, lines: Iterable[str]) -> Items:
        """A list with a dash before each line."""
        return Items(title, [(DASH, line) for line in lines])

    def text(self) -> list[str]:
        """The lines as they are printed."""
        title = wrap(self.title) if self.title else []
        return [*title, *(line for mark, text in self.lines for line in wrap(text, f"  {mark}"))]

    def html(self) -> str:
        """The same as a paragraph and a list."""
        title = f"<p>{escape(self.title)}</p>\n" if self.title else ""
        lines = (" ".join(f"{'' if mark == DASH else mark} {text}".split()) for mark, text in self.lines)
        return title + "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>"


# A string is a paragraph.
Block = str | Table | Items


class Shown:
    """Has a text of lines of at most 120 columns, and an HTML form, of the blocks that its class gives."""

    def blocks(self) -> Sequence[Block]:
        """What there is to show, in order."""
        raise NotImplementedError

    def __str__(self) -> str:
        return text_of(self.blocks())

    def _repr_html_(self) -> str:
        return "\n".join(_html(block) for block in self.blocks())


def text_of(blocks: Sequence[Block]) -> str:
    """Paragraphs below one another, and a blank line around tables and lists."""
    lines: list[str] = []
    for i, block in enumerate(blocks):
        if i and not (isinstance(block, str) and isinstance(blocks[i - 1], str)):
            lines.append("")
        lines += _lines(block)
    return "\n".join(lines)


def _lines(block: Block) -> list[str]:
    if isinstance(block, str):
        return wrap(block, rest="  ")
    return block.lines() if isinstance(block, Table) else block.text()


def _html(block: Block) -> str:
    return f"<p>{escape(block)}</p>" if isinstance(block, str) else block.html()
