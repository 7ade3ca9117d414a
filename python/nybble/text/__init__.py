"""How nybble prints: blocks of text and tables that fit a terminal of 120 columns, and the same blocks as HTML."""

from __future__ import annotations

from .lines import WIDTH, shorten, span, wrap
from .shown import Block, Items, Shown
from .table import Table

__all__ = ["WIDTH", "Block", "Items", "Shown", "Table", "shorten", "span", "wrap"]
