"""Weights of which two of each four inputs are kept (2:4), for GPUs: the layouts quads8, quads4 and quads16.

quads8  8 bits; float32 scales
quads16 bfloat16; scales of 1
quads4  4 bits; bfloat16 scales by group, then output

Codes and places are the left operand of mma.sp m16n8k32, which takes two values of each quad and their places. A tile
has 64 outputs (rows 8 g + 2 f + r) x 64 inputs (quads 8 h + 4 p + 2 s + u). Lane 4 g + 2 u + p holds, of fragment f and
half h, the rows r = 0, 1 and the quads s = 0, 1 with both of their values e:

codes   quads8  int8 [fragment f][lane][h][r][s][e]
        quads4  uint8 [half h][lane][f][e][s], the row r = 0 in the low nibble
        quads16 bfloat16 [half h][fragment f][lane][s][r][e]
places  uint8 [lane' 4 g + 2 (f % 2) + s][h][f / 2][r][u]; the quad p = 0 in the low nibble, whose lower two bits are
        the place of its first value. The words of each pair of fragments lie with the lanes that mma.sp reads them from.

The values of a quad are in the order of their places. The two places differ even where fewer than two values are not 0.
Padding as in gpu.py; the codes there are not kept.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from ..weights.rounding import QuantizedWeight
from ..weights.scheme import Scheme
from .gpu import TILE, by_group, by_output, groups_of, padded_to_tiles
from .layout import Layout, Spec

# The codes of a tile in memory, by bits.
_CODE_SHAPES = {8: (4, 8, 2, 2, 2, 2, 2, 2), 4: (2, 8, 2, 2, 4, 2, 2), 16: (2, 4, 8, 2, 2, 2, 2, 2)}
_PLACE_SHAPE = (8, 2, 2, 2, 2, 2, 2)
# From (tile, g, f, r; block, h, p, s, u; e) to the order in memory. Nibbles of a byte come last.
_CODES = {
    8: (0, 4, 2, 1, 8, 6, 5, 3, 7, 9),
    4: (0, 4, 5, 1, 8, 6, 2, 9, 7, 3),
    16: (0, 4, 5, 2, 1, 8, 6, 7, 3, 9),
}
# From (tile, g, f / 2, f % 2, r; block, h, p, s, u).
_PLACES = (0, 5, 1, 3, 8, 6, 2, 4, 9, 7)


def compress(codes: Tensor, zero: int, bits: int) -> dict[str, Tensor]:
    """The sections codes and places of codes (N, K), both multiples of 64; zero: the code of the weight 0.

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
    """The codes (N, K) of the sections, in their shapes; the inverse of compress."""
    tiles, blocks = places.shape[:2]
    n, k = tiles * TILE, blocks * TILE
    shape = (tiles, 8, 4, 2, blocks, 2, 2, 2, 2, 2)
    values = _back(_apart(codes) if bits == 4 else codes, shape, _CODES[bits]).reshape(n, k // 4, 2)
    pairs = _back(_apart(places), (tiles, 8, 2, 2, 2, blocks, 2, 2, 2, 2), _PLACES).reshape(n, k // 4, 1)
    index = torch.cat((pairs & 3, pairs >> 2), dim=-1).long()
    whole = torch.full((n, k // 4, 4), zero, dtype=codes.dtype, device=codes.device)
    return whole.scatter_(-1, index, values).view(n, k)


def _joined(nibbles: Tensor) -> Tensor:
    """Two neighbours along the last axis in a byte, the first in the low nibble."""
    return nibbles[..., 0] | nibbles[..., 1] << 4


def _apart(pairs: Tensor) -> Tensor:
    return torch.stack((pairs & 15, pairs >> 4), dim=-1)


def _back(tensor: Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """The inverse of view(shape).permute(order)."""
    return tensor.reshape([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(order))])


def _sections(bits: int, scheme: Scheme, out_features: int, in_features: int) -> dict[str, Spec]:
    kind = scheme.weight_type
    n, k = padded_to_tiles(scheme, out_features, in_features)
    tiles = (n // TILE, k // TILE)
    return {
        "codes": ((*tiles, *_CODE_SHAPES[bits]), kind.stored),
        "places": ((*tiles, *_PLACE_SHAPE), torch.uint8),
        "scale": ((groups_of(scheme, k), n) if kind.group_sizes and kind.sparse_groups else (n,), kind.scale),
    }


def _fill(bits: int, quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> dict[str, Tensor]:
    out_features, kind = quantized.qweight.shape[0], scheme.weight_type
    n, k = padded_to_tiles(scheme, out_features, in_features)
    codes = kind.unpack(quantized.qweight, in_features)
    codes = zero_pad(codes, (0, k - in_features, 0, n - out_features), value=kind.middle)
    return {**compress(codes, kind.middle, bits), **by_group(quantized, scheme, in_features)}


def _collect(
    bits: int, parts: dict[str, Tensor], scheme: Scheme, out_features: int, in_features: int
) -> QuantizedWeight:
    kind = scheme.weight_type
    codes = expand(parts["codes"], parts["places"], kind.middle, bits)[:out_features, :in_features]
    scale = parts["scale"].reshape(-1, parts["scale"].shape[-1])
    per_group = by_output({"scale": scale}, scheme, out_features, in_features)
    return QuantizedWeight(kind.pack(codes).contiguous(), **per_group)


def _layout(bits: int) -> Layout:
    return Layout(
        f"quads{bits}", partial(_sections, bits), partial(_fill, bits), partial(_collect, bits), padded_to_tiles
    )


LAYOUTS = tuple(_layout(bits) for bits in (8, 4, 16))
