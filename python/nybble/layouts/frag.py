"""Dense 4-bit weights for GPUs: the layout frag4.

Tiles of 64 output features x 64 inputs, 2 KiB, in the order in which 32 lanes hold them as the left operand of mma.sync
m16n8k16 (16-bit floats) and m16n8k32 (8-bit integers): one 16-byte load gives a lane 32 weights. The rows of a lane are
eight neighbours, so their scales and outputs are one load and one store. bfloat16 scales and zero points by group, then
output; sums of the weights, which take out the zero point of the activations.

A tile is [fragment 4][lane 8 x 4][word 2 x 2][byte 4]. The byte of (f; g, t; j, l; b) holds row 8 g + 2 f in its low
nibble and the next row in its high nibble, both at input 32 j + 8 t + 4 l + (0, 2, 1, 3)[b]. The nibbles p and p + 4 of
a word are then the pair of bfloat16 in one register of a fragment, and its even nibbles the four bytes of another: see
csrc/cuda/activations.cuh. The codes of 8-bit activations are put in the matching order: see csrc/cuda/maps.h, for
mma.sync and for wgmma.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from ..weights.rounding import QuantizedWeight, dequantize_weight
from ..weights.scheme import Scheme
from .gpu import TILE, by_group, by_output, groups_of, padded_to_tiles
from .layout import Layout, Spec

# Axes of codes viewed as (tile, g, f, nibble; block, j, t, l, pair, place) -> as a tile lies in memory, and back.
_TO_TILE = (0, 4, 2, 1, 6, 5, 7, 9, 8, 3)
_FROM_TILE = tuple(_TO_TILE.index(axis) for axis in range(10))


def _sections(scheme: Scheme, out_features: int, in_features: int) -> dict[str, Spec]:
    kind = scheme.weight_type
    n, k = padded_to_tiles(scheme, out_features, in_features)
    groups = (groups_of(scheme, k), n)
    spec: dict[str, Spec] = {
        "codes": ((n // TILE, k // TILE, 4, 8, 4, 2, 2, 4), kind.stored),
        "scale": (groups, kind.scale),
    }
    if not scheme.symmetric and kind.zero_point is not None:
        spec["zero_point"] = (groups, kind.zero_point)
    spec["weight_sum"] = ((n,), torch.float32)
    return spec


def _fill(quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> dict[str, Tensor]:
    out_features = quantized.qweight.shape[0]
    n, k = padded_to_tiles(scheme, out_features, in_features)
    rows = (0, n - out_features)
    codes = zero_pad(scheme.weight_type.unpack(quantized.qweight, in_features), (0, k - in_features, *rows))
    tiled = codes.view(n // TILE, 8, 4, 2, k // TILE, 2, 4, 2, 2, 2).permute(_TO_TILE)
    # Exact in float64 unless the scales span many octaves.
    total = dequantize_weight(quantized, scheme, in_features).double().sum(dim=1)
    return {
        "codes": tiled[..., 0] | (tiled[..., 1] << 4),
        **by_group(quantized, scheme, in_features),
        "weight_sum": zero_pad(total, rows).float(),
    }


def _collect(parts: dict[str, Tensor], scheme: Scheme, out_features: int, in_features: int) -> QuantizedWeight:
    tiled = torch.stack((parts["codes"] & 15, parts["codes"] >> 4), dim=-1)
    # The byte's place splits into the pair's two inputs: (0, 2, 1, 3).
    codes = tiled.unflatten(-2, (2, 2)).permute(_FROM_TILE).flatten(4).flatten(0, 3)
    packed = scheme.weight_type.pack(codes[:out_features, :in_features])
    return QuantizedWeight(packed, **by_output(parts, scheme, out_features, in_features))


LAYOUTS = (Layout("frag4", _sections, _fill, _collect, padded_to_tiles),)
