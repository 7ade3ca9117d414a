"""How weights of which two of each four inputs are kept lie for GPUs: the codes of the layouts quads8, quads4 and quads16.

The left operand of mma.sp m16n8k32, which takes two values of each quad and their places. A tile has 64 outputs (rows
8 g + 2 f + r) x 64 inputs (quads 8 h + 4 p + 2 s + u), and lane 4 g + 2 u + p holds, of fragment f and half h, the rows
r = 0, 1 and the quads s = 0, 1 with both of their values e:

codes   quads8  int8 [fragment f][lane][h][r][s][e]
        quads4  uint8 [half h][lane][f][e][s], the row r = 0 in the low nibble
        quads16 bfloat16 [half h][fragment f][lane][s][r][e]
places  uint8 [lane' 4 g + 2 (f % 2) + s][h][f / 2][r][u], the quad p = 0 in the low nibble, which has the place of its
        first value in its lower two bits: of each pair of fragments the words lie with the lanes that mma.sp asks

The values of a quad are in the order of their places, which differ also where fewer than two are not zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 64
# From (tile, g, f, r; block, h, p, s, u; e) to the order in memory. Nibbles of a byte come last.
_CODES = {
    8: (0, 4, 2, 1, 8, 6, 5, 3, 7, 9),
    4: (0, 4, 5, 1, 8, 6, 2, 9, 7, 3),
    16: (0, 4, 5, 2, 1, 8, 6, 7, 3, 9),
}
# From (tile, g, f / 2, f % 2, r; block, h, p, s, u).
_PLACES = (0, 5, 1, 3, 8, 6, 2, 4, 9, 7)


def compress(codes: Tensor, zero: int, bits: int) -> dict[str, Tensor]:
    """The sections codes and places of integers (N, K), both multiples of 64, of which `zero` stands for 0.

    Raises:
        ValueError: a quad has more than two that are not zero.
    """
    n, k = codes.shape
    quads = codes.view(n, k // 4, 4)
    empty = quads == zero
    if bool((empty.sum(-1) < 2).any()):
        raise ValueError("codes: more than two of four are not zero")
    order = empty * 4 + torch.arange(4, device=codes.device)
    places = order.argsort(-1)[..., :2].sort(-1).values
    values = quads.gather(-1, places).view(n // TILE, 8, 4, 2, k // TILE, 2, 2, 2, 2, 2).permute(_CODES[bits])
    pairs = (places[..., 0] | places[..., 1] << 2).to(torch.uint8)
    pairs = pairs.view(n // TILE, 8, 2, 2, 2, k // TILE, 2, 2, 2, 2).permute(_PLACES)
    return {"codes": _joined(values) if bits == 4 else values, "places": _joined(pairs)}


def expand(codes: Tensor, places: Tensor, zero: int, bits: int) -> Tensor:
    """The integers (N, K) of the sections, in their shapes; the inverse of compress."""
    tiles, blocks = places.shape[:2]
    n, k = tiles * TILE, blocks * TILE
    shape = (tiles, 8, 4, 2, blocks, 2, 2, 2, 2, 2)
    values = _back(_apart(codes) if bits == 4 else codes, shape, _CODES[bits]).reshape(n, k // 4, 2)
    pairs = _back(_apart(places), (tiles, 8, 2, 2, 2, blocks, 2, 2, 2, 2), _PLACES).reshape(n, k // 4, 1)
    index = torch.cat((pairs & 3, pairs >> 2), dim=-1).long()
    whole = torch.full((n, k // 4, 4), zero, dtype=codes.dtype, device=codes.device)
    return whole.scatter_(-1, index, values).view(n, k)


def _joined(nibbles: Tensor) -> Tensor:
    """Bytes of neighbours along the last axis, the first in the low nibble."""
    return nibbles[..., 0] | nibbles[..., 1] << 4


def _apart(pairs: Tensor) -> Tensor:
    return torch.stack((pairs & 15, pairs >> 4), dim=-1)


def _back(tensor: Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """A tensor whose axes were put in an order, as it was."""
    return tensor.reshape([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(order))])
