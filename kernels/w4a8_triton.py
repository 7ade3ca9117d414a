"""w4a8: y = (sum_g scale_g (x codes . codes - zero_point_g * sums_g) - act_zero * weight_sum) * act_scale + bias.

    x (M, K) float -> codes int8 (M, k_padded), act_scale, act_zero (M,), sums int32 (M, groups)   (quantize_triton)
    layout frag4: tiles of 64 x 64 codes 0..15, scale bfloat16 and zero_point uint8 (groups, N_padded), weight_sum float32
    (N_padded,); bias (N,); y (M, N)

Built on the int8 tl.dot (IMMA, on sm_90 IGMMA) with the weights as its first operand; the result is y transposed. Groups
are added in order with fused multiply-adds, so the result is bit-identical to the CPU kernels. K cannot be split for that
reason, so few rows on a narrow layer do not fill a GPU. The CUDA kernels compute the same product faster.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import layouts
from ..weights.scheme import Scheme
from .configs import Config, choose
from .frag4 import load_codes, load_zero_points
from .launch import current, machine
from .quantize_triton import Codes, quantize
from .replay import ReplayedPlan, launch
from .tiles import row_vector, store_tile, tile_of

NAME = "w4a8_triton"
LAYOUT = "frag4"


@triton.jit(do_not_specialize=["m"])
def w4a8_kernel(
    x,
    codes,
    act_scale,
    act_zero,
    sums,
    scale,
    zero_point,
    weight_sum,
    bias,
    y,
    m,
    n,
    n_padded,
    k_padded,
    groups,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """GROUP: inputs that share a scale, a multiple of BK; 0: all."""
    tile_row, tile_column = tile_of(m, n, BM, BN)
    rows, columns, ks = tile_row * BM + tl.arange(0, BM), tile_column * BN + tl.arange(0, BN), tl.arange(0, BK)
    row, column = rows % m, columns % n_padded
    x += row.to(tl.int64)[None, :] * k_padded + ks[:, None]
    first, tiles_n, tiles_k = tile_column * (BN // 64), n_padded // 64, k_padded // 64
    size = GROUP if GROUP else k_padded
    total = tl.zeros((BN, BM), tl.float32)
    products = tl.zeros((BN, BM), tl.int32)
    for begin in range(0, k_padded, BK):
        weights = load_codes(codes, first, tiles_n, tiles_k, begin, BN, BK).to(tl.int8)
        products = tl.dot(weights, tl.load(x + begin), products, out_dtype=tl.int32)
        if GROUP and (begin + BK) % size == 0:
            total = _add_group(total, products, begin // size, row, column, n_padded, groups, sums, scale, zero_point)
            products = tl.zeros((BN, BM), tl.int32)
    if GROUP == 0:
        total = _add_group(total, products, 0, row, column, n_padded, groups, sums, scale, zero_point)
    zero = tl.broadcast_to(-tl.load(act_zero + row).to(tl.float32)[None, :], (BN, BM))
    offset = tl.broadcast_to(tl.load(weight_sum + column)[:, None], (BN, BM))
    row_scale = tl.broadcast_to(tl.load(act_scale + row)[None, :], (BN, BM))
    shift = tl.broadcast_to(row_vector(bias, columns, columns < n)[:, None], (BN, BM))
    total = tl.fma(tl.fma(zero, offset, total), row_scale, shift)
    store_tile(y, tl.trans(total), rows, columns, m, n)


@triton.jit
def _add_group(total, products, group, row, column, n_padded, groups, sums, scale, zero_point):
    """total + scale * (products - zero_point * sums) for one group."""
    act_sum = tl.load(sums + row.to(tl.int64) * groups + group)
    centred = products - load_zero_points(zero_point, group, column, n_padded)[:, None] * act_sum[None, :]
    of_group = tl.load(scale + group * n_padded + column).to(tl.float32)
    return tl.fma(centred.to(tl.float32), tl.broadcast_to(of_group[:, None], total.shape), total)


def multiply(
    x: Codes, weight: dict[str, Tensor], bias: Tensor | None, out: Tensor, scheme: Scheme, config: Config
) -> None:
    """Writes out (M, N), contiguous, from quantized activations with sums; weight: the sections of frag4."""
    (m, n), k_padded = out.shape, x.codes.shape[1]
    if not m:
        return
    groups, n_padded = weight["scale"].shape
    group = scheme.group_size or 0
    with current(out):
        launch(
            w4a8_kernel, (config.tiles(m, n),),
            x.codes, weight["codes"], x.scale, x.zero, x.sums,
            weight["scale"], weight.get("zero_point"), weight["weight_sum"], bias, out,
            m, n, n_padded, k_padded, groups,
            GROUP=group, BM=config.bm, BN=config.bn, BK=min(config.bk, group or config.bk),
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
        )  # fmt: skip


class W4A8Plan(ReplayedPlan):
    """The kernel for one weight shape."""

    def launch(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        scheme, n, k = self._shape
        rows, weight = x.reshape(-1, k), layouts.views(packed, LAYOUT, *self._shape)
        n_padded = weight["scale"].shape[-1]
        codes = quantize(rows, weight["codes"].numel() * 2 // n_padded, scheme.group_size, sums=True)
        config = choose(NAME, len(rows), n, codes.codes.shape[1], machine(x.device))
        multiply(codes, weight, bias, out.view(-1, n), scheme, config)
