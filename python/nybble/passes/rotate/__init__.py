"""`nybble.rotate`: rotate the hidden states of a transformer by a Hadamard matrix, which spreads outlier channels."""

from __future__ import annotations

from .rotate import rotate

__all__ = ["rotate"]
