"""How nybble prints: parts of reports that fit a terminal of 120 columns, and the same parts as HTML."""

from __future__ import annotations

from .lines import WIDTH, break_name, shorten, span, wrap
from .shown import Items, Part, Shown
from .table import Table

__all__ = ["WIDTH", "Items", "Part", "Shown", "Table", "break_name", "shorten", "span", "wrap"]
