"""Loads 4-bit weights of the layout frag4: tiles of 64 x 64 in the order of the tensor cores' fragments.

A tile's 2,048 bytes are [4 f][8 g][4 t][2 j][2 l][4 b]: the low nibble is row 8 g + 2 f, the high nibble the next row,
both at k = 32 j + 8 t + 4 l + (0, 2, 1, 3)[b]. Bytes are loaded contiguously and permuted in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_codes(codes, first_tile, tiles_n, tiles_k, begin, BN: tl.constexpr, BK: tl.constexpr):
    """Codes 0..15, uint8 (BN, BK): rows from 64 * first_tile, inputs from `begin`. BN: a multiple of 64; BK: 32 or 64.

    Rows beyond the last tile wrap around to the first.
    """
    TILES: tl.constexpr = BN // 64
    HALVES: tl.constexpr = BK // 32
    at = tl.arange(0, TILES * HALVES * 1024)
    tile = ((first_tile + at // (HALVES * 1024)) % tiles_n).to(tl.int64) * tiles_k + begin // 64
    within = at % (HALVES * 1024)
    if HALVES == 1:
        within = within // 8 * 16 + begin // 32 % 2 * 8 + within % 8
    pairs = tl.load(codes + tile * 2048 + within)
    split = tl.reshape(pairs, (TILES, 4, 8, 4, HALVES, 2, 2, 2))
    both = tl.join(split & 15, split >> 4)
    # tile, g, f, nibble; then j, t, l and the two bits of b, low bit first
    ordered = tl.permute(both, (0, 2, 1, 8, 4, 3, 5, 7, 6))
    return tl.reshape(ordered, (BN, BK))


@triton.jit
def load_zero_points(zero_point, group, columns, n_padded):
    """int32 zero points of the columns in a group; 8 for a symmetric layout."""
    if zero_point is None:
        return tl.full(columns.shape, 8, tl.int32)
    else:
        return tl.load(zero_point + group * n_padded + columns % n_padded).to(tl.int32)
