"""Codes of a few bits, as other libraries' files have them, regrouped."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from .base import memory


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Codes, uint8 (R, count), of ``bits`` from 1 to 7, of rows of bytes, uint8 (R, B), contiguous: code i is the bits
    [i * bits, i * bits + bits) of its row, the low ones first."""
    (rows, width), codes = packed.shape, torch.empty(len(packed), count, dtype=torch.uint8)
    _C.unpack_bits(memory(packed), rows, width, bits, count, memory(codes), torch.get_num_threads())
    return codes


def select_nibbles(packed: Tensor, order: Tensor) -> Tensor:
    """Codes of 4 bits, two a byte, in another order: (N, ceil(K / 2)) of (N, B), code i being code order[i]. Both are contiguous,
    order is int32 (K,)."""
    (rows, width), count = packed.shape, len(order)
    selected = torch.empty(rows, -(-count // 2), dtype=torch.uint8)
    _C.select_nibbles(memory(packed), rows, width, memory(order), count, memory(selected), torch.get_num_threads())
    return selected


def transpose_nibbles(words: Tensor, places: Tensor) -> Tensor:
    """Words of eight codes, int32 (K, W), to codes along K, two a byte: uint8 (8 * W, ceil(K / 2)). Nibble places[c] of word
    (k, w), counted from the lowest, is that of column 8 * w + c. Both are contiguous, places is int32 (8,)."""
    k, width = words.shape
    rows = torch.empty(width * 8, -(-k // 2), dtype=torch.uint8)
    _C.transpose_nibbles(memory(words), k, width, memory(places), memory(rows), torch.get_num_threads())
    return rows
