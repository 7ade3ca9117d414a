"""weight (N, K) = (codes - zero_point) * scale from the packed layouts, rounded once to float32, bf16 or fp16.

    a program writes 64 outputs x 64 inputs; computed in float32, as rounding.dequantize_weight defines it

The first half of the matmul fallback (matmul_triton). Bound by writing the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import layouts
from ..weights.scheme import Scheme
from .frag4 import load_codes, load_zero_points
from .launch import current
from .quads import load_quads

_TILE = 64


@triton.jit
def dequantize_kernel(
    codes,
    places,
    scale,
    zero_point,
    weight,
    n,
    k,
    n_padded,
    k_padded,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """GROUP: inputs that share a scale; 0: all. places: positions of the kept weights (2:4), else None."""
    tiles_k = tl.cdiv(k, TILE)
    tile_row, begin = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k * TILE
    rows, ks = tile_row * TILE + tl.arange(0, TILE), begin + tl.arange(0, TILE)
    if places is not None:
        integers = load_quads(codes, places, tile_row.to(tl.int64) * (k_padded // TILE) + begin // TILE, BITS)
    elif BITS == 8:
        integers = tl.load(codes + rows[:, None].to(tl.int64) * k_padded + ks[None, :]).to(tl.int32)
    else:
        integers = load_codes(codes, tile_row, n_padded // TILE, k_padded // TILE, begin, TILE, TILE).to(tl.int32)
    if BITS != 4:
        factor = tl.load(scale + rows)[:, None]
    elif GROUP == 32:
        group = (ks // GROUP)[None, :] * n_padded + rows[:, None]
        factor = tl.load(scale + group).to(tl.float32)
        if places is None:
            if zero_point is None:
                integers -= 8
            else:
                integers -= tl.load(zero_point + group).to(tl.int32)
    else:
        group = begin // GROUP if GROUP else 0
        factor = tl.load(scale + group * n_padded + rows).to(tl.float32)[:, None]
        if places is None:
            integers -= load_zero_points(zero_point, group, rows, n_padded)[:, None]
    values = integers.to(tl.float32) * factor
    at = rows[:, None].to(tl.int64) * k + ks[None, :]
    tl.store(weight + at, values.to(weight.dtype.element_ty), mask=(rows < n)[:, None] & (ks < k)[None, :])


def layout_of(scheme: Scheme) -> str:
    """The layout from which weights of a scheme are dequantized."""
    if scheme.sparsity is not None:
        return f"quads{scheme.weight_bits}"
    return "rows8" if scheme.weight_bits == 8 else "frag4"


def dequantize(packed: Tensor, scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """The dense weight (N, K), in a float dtype, from its packed form (see layout_of)."""
    layout = layout_of(scheme)
    parts = layouts.views(packed, layout, scheme, out_features, in_features)
    weight = packed.new_empty((out_features, in_features), dtype=dtype)
    n_padded, k_padded = layouts.padded(layout, scheme, out_features, in_features)
    with current(packed):
        dequantize_kernel[(triton.cdiv(in_features, _TILE) * triton.cdiv(out_features, _TILE),)](
            parts["codes"], parts.get("places"), parts["scale"], parts.get("zero_point"), weight, out_features, in_features, n_padded, k_padded,
            BITS=scheme.weight_bits, GROUP=scheme.group_size or 0, TILE=_TILE, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return weight
