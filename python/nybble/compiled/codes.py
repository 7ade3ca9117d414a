"""Codes of a few bits, as other libraries' files have them, regrouped by the compiled library. tests/test_codes.py has the
definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Rows of bytes, uint8 (R, B), to codes, uint8 (R, count): code i is bits [i * bits, i * bits + bits) of its row, low bit
    first. ``bits`` is from 1 to 7.

    Raises ValueError, with the argument, for other bits, and where a row has fewer codes.
    """
    if not packed.numel() or not count:
        return torch.empty(len(packed), count, dtype=torch.uint8)
    return native.unpack_bits(packed.contiguous(), bits, count)


def select_nibbles(packed: Tensor, order: Tensor) -> Tensor:
    """Rows of codes of 4 bits, two a byte, the first in the low half, in another order: code i of each row is code order[i].

    Raises ValueError where rows have no such code.
    """
    return native.select_nibbles(packed.contiguous(), order.to(torch.int32).contiguous())


def transpose_nibbles(words: Tensor, places: tuple[int, ...]) -> Tensor:
    """Words of eight codes each, int32 (K, W), to rows of codes along K, two a byte: uint8 (8 * W, ceil(K / 2)).

    Row 8 * w + c has nibble places[c], counted from the lowest, of the words (0, w), (1, w), ...
    """
    return native.transpose_nibbles(words.contiguous(), torch.tensor(places, dtype=torch.int32))
