"""Weights out of the layouts quads8, quads4 and quads16 (see nybble/quads.py), two of each four inputs kept."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_quads(codes, places, tile, BITS: tl.constexpr):
    """Codes less the zero point, (64, 64), of a tile, with the zeros that were left out; int32, of quads16 float32.

    tile: int64.
    """
    pairs = tl.load(places + tile * 512 + tl.arange(0, 512)).to(tl.int32)
    nibbles = tl.join(pairs & 15, pairs >> 4)
    # g, f % 2, s, h, f / 2, r, u, p -> rows g, f, r and quads h, p, s, u
    ordered = tl.permute(tl.reshape(nibbles, (8, 2, 2, 2, 2, 2, 2, 2)), (0, 4, 1, 5, 3, 7, 2, 6))
    place = tl.reshape(ordered, (64, 16))
    if BITS == 16:
        halves = tl.load(codes + tile * 2048 + tl.arange(0, 2048)).to(tl.float32)
        # h, f, g, u, p, s, r, e
        values = tl.permute(tl.reshape(halves, (2, 4, 8, 2, 2, 2, 2, 2)), (2, 1, 6, 0, 4, 5, 3, 7))
    elif BITS == 8:
        bytes_ = tl.load(codes + tile * 2048 + tl.arange(0, 2048)).to(tl.int32)
        # f, g, u, p, h, r, s, e
        values = tl.permute(tl.reshape(bytes_, (4, 8, 2, 2, 2, 2, 2, 2)), (1, 0, 5, 4, 3, 6, 2, 7))
    else:
        bytes_ = tl.load(codes + tile * 1024 + tl.arange(0, 1024)).to(tl.int32)
        # h, g, u, p, f, e, s, r
        split = tl.reshape(tl.join(bytes_ & 15, bytes_ >> 4), (2, 8, 2, 2, 4, 2, 2, 2))
        values = tl.permute(split, (1, 4, 7, 0, 3, 6, 2, 5)) - 8
    first, second = tl.split(tl.reshape(values, (64, 16, 2)))
    # Pairs of the places 0 and 2, 1 and 3 become neighbours in their order.
    even = tl.join(_at(place, first, second, 0), _at(place, first, second, 2))
    odd = tl.join(_at(place, first, second, 1), _at(place, first, second, 3))
    return tl.reshape(tl.join(even, odd), (64, 64))


@triton.jit
def _at(place, first, second, WHERE: tl.constexpr):
    """What stands at a place of each quad."""
    return tl.where((place & 3) == WHERE, first, tl.where((place >> 2) == WHERE, second, 0))
