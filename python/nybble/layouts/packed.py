"""How packed weights lie. `pack` and `unpack` here, in plain torch, are the definition; native packing equals them byte
for byte. A packed weight is one uint8 tensor of sections, each aligned to 64 bytes; csrc/pack.h draws them.

plain   the portable tensors one after another: for devices without a kernel
n16k4   8 bits: tiles of 16 output features, 4 inputs a word; float32 scales; sums of the codes for u8 x s8 multiplies
n16k8   4 bits: tiles of 16 output features, 8 inputs a 32-bit word, byte j = input j (low) and j + 4 (high); sums of
        the weights, which take out the activations' zero point

mask8, mask4, gather8, blocks8: sparse weights, packed by csrc/sparse.cpp alone
rows8, frag4, quads8, quads4, quads16: for GPUs, see layouts_gpu.py

Padding: output features to 16 with code 0 and scale 0; inputs to 4 (n16k4), or to the group, or to 8 where one group
spans them (n16k8), with code 0, which meets activation code 0 and so adds nothing.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from ..weights.rounding import QuantizedWeight, dequantize_weight, pack_nibbles, portable_spec, unpack_nibbles
from ..weights.scheme import Scheme
from . import gpu as layouts_gpu

ALIGNMENT = 64
TILE_N = 16
PLAIN = "plain"
BLOCK_K = {"n16k4": 4, "n16k8": 8}
GPU = ("rows8", "frag4", "quads8", "quads4", "quads16")
# Layouts that are packed in torch, on the weight's device.
IN_TORCH = (PLAIN, *GPU)
# The dense layout whose lines a mask layout thins out.
MASK_OF = {"n16k4": "mask8", "n16k8": "mask4"}


def padded_in_features(layout: str, scheme: Scheme, in_features: int) -> int:
    """K as the layout holds it."""
    if layout == PLAIN:
        return in_features
    if layout in GPU:
        return layouts_gpu.padded(layout, scheme, 1, in_features)[1]
    return _round_up(in_features, scheme.group_size or BLOCK_K[layout])


def sections(
    layout: str, scheme: Scheme, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of each section of a packed weight, in order."""
    if layout == PLAIN:
        return portable_spec(scheme, out_features, in_features)
    if layout in GPU:
        return layouts_gpu.sections(layout, scheme, out_features, in_features)
    tiles = -(-out_features // TILE_N)
    k = padded_in_features(layout, scheme, in_features)
    per_group = (tiles, k // (scheme.group_size or k), TILE_N)
    blocks = (tiles, k // BLOCK_K[layout], TILE_N, 4)
    if layout == "n16k4":
        return {
            "codes": (blocks, torch.int8),
            "scale": (per_group, torch.float32),
            "column_sum": ((tiles, TILE_N), torch.int32),
        }
    spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": (blocks, torch.uint8),
        "scale": (per_group, torch.bfloat16),
    }
    if not scheme.symmetric:
        spec["zero_point"] = (per_group, torch.uint8)
    spec["weight_sum"] = ((tiles, TILE_N), torch.float32)
    return spec


def packed_nbytes(layout: str, scheme: Scheme, out_features: int, in_features: int) -> int:
    """Bytes of the packed tensor."""
    return offsets(layout, scheme, out_features, in_features)[""]


def pack(quantized: QuantizedWeight, layout: str, scheme: Scheme, in_features: int) -> Tensor:
    """The packed form, uint8 (packed_nbytes,), of a portable weight."""
    out_features = quantized.qweight.shape[0]
    filled = _fill(quantized, layout, scheme, in_features)
    parts = []
    for name, (shape, dtype) in sections(layout, scheme, out_features, in_features).items():
        section = filled[name].to(dtype).reshape(shape).contiguous().view(-1).view(torch.uint8)
        parts.append(zero_pad(section, (0, -section.numel() % ALIGNMENT)))
    return torch.cat(parts)


def offsets(layout: str, scheme: Scheme, out_features: int, in_features: int) -> dict[str, int]:
    """The byte at which each section of a packed weight begins; "" is where the last one ends."""
    found, at = {}, 0
    for name, (shape, dtype) in sections(layout, scheme, out_features, in_features).items():
        found[name] = at
        at += _round_up(_nbytes(shape, dtype), ALIGNMENT)
    return {**found, "": at}


def aligned(packed: Tensor) -> Tensor:
    """A packed weight for a GPU's kernels, which load vectors of 16 bytes: itself, or a copy where it begins elsewhere."""
    address = packed.data_ptr()
    if address % 16 == 0:
        return packed
    warnings.warn(
        f"packed: begins at address {address:#x}, which is no multiple of 16, so it is copied at every call; "
        "packed.clone() need not be",
        RuntimeWarning,
        stacklevel=3,
    )
    return packed.clone()


def views(packed: Tensor, layout: str, scheme: Scheme, out_features: int, in_features: int) -> dict[str, Tensor]:
    """The sections of a packed weight by name, sharing its memory."""
    begin = offsets(layout, scheme, out_features, in_features)
    return {
        name: packed[begin[name] : begin[name] + _nbytes(shape, dtype)].view(dtype).view(shape)
        for name, (shape, dtype) in sections(layout, scheme, out_features, in_features).items()
    }


def unpack(packed: Tensor, layout: str, scheme: Scheme, out_features: int, in_features: int) -> QuantizedWeight:
    """The portable weight of a packed one; the exact inverse of pack."""
    parts = views(packed, layout, scheme, out_features, in_features)
    if layout == PLAIN:
        return QuantizedWeight(**parts)
    if layout in GPU:
        return layouts_gpu.collect(parts, layout, scheme, out_features, in_features)
    codes = parts["codes"]
    if layout == "n16k8":
        codes = torch.cat((codes & 15, codes >> 4), dim=-1)
    codes = codes.transpose(1, 2).flatten(0, 1).flatten(1)[:out_features, :in_features]
    per_group = {
        name: parts[name].transpose(1, 2).flatten(0, 1)[:out_features].contiguous()
        for name in ("scale", "zero_point")
        if name in parts
    }
    return QuantizedWeight(qweight=pack_nibbles(codes) if layout == "n16k8" else codes.contiguous(), **per_group)


def _fill(quantized: QuantizedWeight, layout: str, scheme: Scheme, in_features: int) -> dict[str, Tensor]:
    if layout == PLAIN:
        return quantized.tensors()
    if layout in GPU:
        return layouts_gpu.fill(quantized, layout, scheme, in_features)
    return _fill_tiles(quantized, layout, scheme, in_features)


def _fill_tiles(quantized: QuantizedWeight, layout: str, scheme: Scheme, in_features: int) -> dict[str, Tensor]:
    n, block = quantized.qweight.shape[0], BLOCK_K[layout]
    rows = -n % TILE_N
    codes = quantized.qweight if layout == "n16k4" else unpack_nibbles(quantized.qweight, in_features)
    codes = zero_pad(codes, (0, padded_in_features(layout, scheme, in_features) - in_features, 0, rows))
    tiled = codes.view(-1, TILE_N, codes.shape[1] // block, block).transpose(1, 2)
    filled = {"codes": tiled if layout == "n16k4" else tiled[..., :4] | (tiled[..., 4:] << 4)}
    if layout == "n16k4":
        filled["column_sum"] = codes.sum(dim=1, dtype=torch.int32)
    else:
        # Exact in float64 unless the scales span many octaves.
        total = dequantize_weight(quantized, scheme, in_features).double().sum(dim=1)
        filled["weight_sum"] = zero_pad(total, (0, rows)).float()
    for name in ("scale", "zero_point"):
        tensor = quantized.tensors().get(name)
        if tensor is not None:
            padded = zero_pad(tensor, (0, 0, 0, rows))
            filled[name] = padded.view(-1, TILE_N, padded.shape[1]).transpose(1, 2)
    return filled


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
