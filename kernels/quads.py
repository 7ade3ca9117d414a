"""Loads 2:4-sparse weights of the layouts quads8, quads4 and quads16 (see nybble/layouts/quads.py)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_quads(codes, places, tile, BITS: tl.constexpr):
    """A dense tile (64, 64) of codes minus the zero point, pruned weights as 0; int32, for quads16 float32 values.

    tile: int64 index.
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
    # Joining (0, 2) and (1, 3) interleaves to the order 0, 1, 2, 3.
    even = tl.join(_at(place, first, second, 0), _at(place, first, second, 2))
    odd = tl.join(_at(place, first, second, 1), _at(place, first, second, 3))
    return tl.reshape(tl.join(even, odd), (64, 64))


@triton.jit
def _at(place, first, second, WHERE: tl.constexpr):
    """The value at position WHERE of each quad; 0 if it was pruned."""
    return tl.where((place & 3) == WHERE, first, tl.where((place >> 2) == WHERE, second, 0))
