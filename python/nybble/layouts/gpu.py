"""How packed weights lie for GPUs: the sections of these layouts, see layouts.py. Plain torch, on the weight's device.

rows8   8 bits: codes int8 row by row, inputs contiguous; float32 scales; sums of the codes, which take out the
        activations' zero point
frag4   4 bits: tiles of 64 output features x 64 inputs, 2 KiB, in the order in which 32 lanes hold them as the left operand
        of mma.sync m16n8k16 (16-bit floats) and m16n8k32 (8-bit integers): one 16-byte load gives a lane 32 weights, and
        a lane's rows are eight neighbours, whose scales and outputs are one load and one store; bfloat16 scales by group,
        then output; sums of the weights

quads8  8 bits, 2:4: codes and places as in quads.py; float32 scales
quads16 bfloat16, 2:4: likewise, with scales of 1
quads4  4 bits, 2:4: likewise; bfloat16 scales by group, then output

A tile of frag4 is [fragment 4][lane 8 x 4][word 2 x 2][byte 4]. The byte of (f; g, t; j, l; b) holds row 8 g + 2 f in its low nibble,
the next row in its high one, both at input 32 j + 8 t + 4 l + (0, 2, 1, 3)[b]. A word's nibbles p and p + 4 are then the
pair of bfloat16 in one register of a fragment, its even nibbles the four bytes of another: see csrc/cuda/activations.cuh. The
codes of 8-bit activations are put in the order that meets them: see csrc/cuda/maps.h, for mma.sync and for wgmma.

Padding: output features to 64 with scale 0; inputs to 128 (rows8), to 64 or to the group (the others), with code 0, which
meets activations that are read as 0, or where zeros are left out with the code of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from ..weights.rounding import QuantizedWeight, dequantize_weight, pack_nibbles, unpack_nibbles
from ..weights.scheme import Scheme
from . import quads

TILE = 64
ROWS_K = 128
_WHOLE = {"quads8": 8, "quads16": 16}  # layouts of 2:4 with a scale an output: bits of a code
_ZERO = 8  # the code of 0 where 4 bits are symmetric
# Axes of codes viewed as (tile, g, f, nibble; block, j, t, l, pair, place) -> as a tile lies in memory, and back.
_TO_TILE = (0, 4, 2, 1, 6, 5, 7, 9, 8, 3)
_FROM_TILE = tuple(_TO_TILE.index(axis) for axis in range(10))


def padded(layout: str, scheme: Scheme, out_features: int, in_features: int) -> tuple[int, int]:
    """N and K as the layout holds them."""
    k = ROWS_K if layout == "rows8" else max(TILE, scheme.group_size or 0)
    return _round_up(out_features, TILE), _round_up(in_features, k)


def sections(
    layout: str, scheme: Scheme, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of each section, in order."""
    n, k = padded(layout, scheme, out_features, in_features)
    if layout == "rows8":
        return {"codes": ((n, k), torch.int8), "scale": ((n,), torch.float32), "column_sum": ((n,), torch.int32)}
    tiles = (n // TILE, k // TILE)
    if layout in _WHOLE:
        codes = ((*tiles, 4, 8, 2, 2, 2, 2, 2, 2), torch.int8)
        if layout == "quads16":
            codes = ((*tiles, 2, 4, 8, 2, 2, 2, 2, 2), torch.bfloat16)
        return {
            "codes": codes,
            "places": ((*tiles, 8, 2, 2, 2, 2, 2, 2), torch.uint8),
            "scale": ((n,), torch.float32),
        }
    groups = k // (scheme.group_size or k)
    if layout == "quads4":
        return {
            "codes": ((*tiles, 2, 8, 2, 2, 4, 2, 2), torch.uint8),
            "places": ((*tiles, 8, 2, 2, 2, 2, 2, 2), torch.uint8),
            "scale": ((groups, n), torch.bfloat16),
        }
    tile = (*tiles, 4, 8, 4, 2, 2, 4)
    spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": (tile, torch.uint8),
        "scale": ((groups, n), torch.bfloat16),
    }
    if not scheme.symmetric:
        spec["zero_point"] = ((groups, n), torch.uint8)
    spec["weight_sum"] = ((n,), torch.float32)
    return spec


def fill(quantized: QuantizedWeight, layout: str, scheme: Scheme, in_features: int) -> dict[str, Tensor]:
    """The sections' contents, from a portable weight."""
    out_features = quantized.qweight.shape[0]
    n, k = padded(layout, scheme, out_features, in_features)
    rows, columns = (0, n - out_features), (0, k - in_features)
    if layout == "rows8":
        codes = quantized.qweight
        sums = codes.sum(dim=1, dtype=torch.int32)
        return {
            "codes": zero_pad(codes, (*columns, *rows)),
            "scale": zero_pad(quantized.scale[:, 0], rows),
            "column_sum": zero_pad(sums, rows),
        }
    if layout in _WHOLE:
        codes = zero_pad(quantized.qweight, (*columns, *rows))
        return {**quads.compress(codes, 0, _WHOLE[layout]), "scale": zero_pad(quantized.scale[:, 0], rows)}
    sparse = layout == "quads4"
    codes = zero_pad(unpack_nibbles(quantized.qweight, in_features), (*columns, *rows), value=_ZERO if sparse else 0)
    filled = quads.compress(codes, _ZERO, 4) if sparse else {"codes": _to_tiles(codes)}
    for name in ("scale", "zero_point"):
        tensor = quantized.tensors().get(name)
        if tensor is not None:
            # Groups beyond the last input, where the padding is longer than a group, have scale 0.
            groups = k // (scheme.group_size or k)
            filled[name] = zero_pad(tensor, (0, groups - tensor.shape[1], *rows)).t()
    if sparse:
        return filled
    # Exact in float64 unless the scales span many octaves.
    total = dequantize_weight(quantized, scheme, in_features).double().sum(dim=1)
    filled["weight_sum"] = zero_pad(total, rows).float()
    return filled


def collect(
    parts: dict[str, Tensor], layout: str, scheme: Scheme, out_features: int, in_features: int
) -> QuantizedWeight:
    """The portable weight of the sections; the exact inverse of fill."""
    if layout == "rows8":
        codes = parts["codes"][:out_features, :in_features].contiguous()
        return QuantizedWeight(codes, parts["scale"][:out_features, None].clone())
    if layout in _WHOLE:
        codes = quads.expand(parts["codes"], parts["places"], 0, _WHOLE[layout])[
            :out_features, :in_features
        ].contiguous()
        return QuantizedWeight(codes, parts["scale"][:out_features, None].clone())
    if layout == "quads4":
        codes = quads.expand(parts["codes"], parts["places"], _ZERO, 4)
    else:
        codes = _from_tiles(parts["codes"])
    codes = codes[:out_features, :in_features]
    groups = scheme.groups(in_features)
    per_group = {
        name: parts[name][:groups, :out_features].t().contiguous() for name in ("scale", "zero_point") if name in parts
    }
    return QuantizedWeight(pack_nibbles(codes), **per_group)


def _to_tiles(codes: Tensor) -> Tensor:
    """The codes (N, K) of frag4, padded, as its tiles."""
    n, k = codes.shape
    tiled = codes.view(n // TILE, 8, 4, 2, k // TILE, 2, 4, 2, 2, 2).permute(_TO_TILE)
    return tiled[..., 0] | (tiled[..., 1] << 4)


def _from_tiles(packed: Tensor) -> Tensor:
    tiled = torch.stack((packed & 15, packed >> 4), dim=-1)
    # The byte's place splits into the pair's two inputs: (0, 2, 1, 3).
    codes: Tensor = tiled.unflatten(-2, (2, 2)).permute(_FROM_TILE).flatten(4).flatten(0, 3)
    return codes


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
