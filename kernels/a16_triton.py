"""w8a16 and w4a16: y = x ((codes - zero_point) * scale)^T + bias with float activations.

    x (M, K) float32, bfloat16 or float16; bias (N,); y (M, N)
    8 bits, layout rows8:  codes int8 (N_padded, k_padded) row by row, scale float32 (N_padded,)
    4 bits, layout frag4:  tiles of 64 x 64 codes, scale bfloat16 and zero_point uint8 (groups, N_padded)

Built on tl.dot with the weights as its first operand; the result is y transposed. codes - zero_point is a small integer,
exact in the activations' dtype, and goes from registers to the tensor cores. The sum of each group is multiplied by its
scale in float32. float32 activations run without tensor cores. With few rows the kernel is bound by reading the codes:
K is then split over programs (split-K), and a second kernel adds the parts in a fixed order. The CUDA kernels compute
the same product faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import layouts
from ..weights.scheme import Scheme
from .configs import Config, choose
from .frag4 import load_codes, load_zero_points
from .launch import compute_type, current, machine
from .replay import ReplayedPlan, launch
from .tiles import row_block, row_vector, store_tile, tile_of

_SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["m"])
def a16_kernel(
    x,
    codes,
    scale,
    zero_point,
    bias,
    y,
    stride_x,
    m,
    n,
    k,
    n_padded,
    k_padded,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """GROUP: inputs that share a scale, a multiple of BK; 0: all. With SPLIT_K > 1, y is float32 (SPLIT_K, m, n)."""
    tile_row, tile_column = tile_of(m, n, BM, BN)
    rows, columns, ks = tile_row * BM + tl.arange(0, BM), tile_column * BN + tl.arange(0, BN), tl.arange(0, BK)
    x += (rows % m).to(tl.int64)[None, :] * stride_x + ks[:, None]
    w = codes + (columns % n_padded).to(tl.int64)[:, None] * k_padded + ks[None, :]
    total = tl.zeros((BN, BM), tl.float32)
    steps = tl.cdiv(tl.cdiv(k, BK), SPLIT_K)
    part = tl.program_id(1)
    for begin in range(part * steps * BK, tl.minimum((part + 1) * steps * BK, k), BK):
        values = tl.load(x + begin, mask=ks[:, None] < k - begin, other=0).to(COMPUTE)
        if BITS == 8:
            total = tl.dot(tl.load(w + begin).to(COMPUTE), values, total, input_precision="ieee")
        else:
            group = begin // GROUP if GROUP else 0
            weights = load_codes(codes, tile_column * (BN // 64), n_padded // 64, k_padded // 64, begin, BN, BK)
            zero = load_zero_points(zero_point, group, columns, n_padded)
            weights = weights.to(COMPUTE) - zero.to(COMPUTE)[:, None]
            if GROUP == 0:
                total = tl.dot(weights, values, total, input_precision="ieee")
            else:
                of_group = tl.load(scale + group * n_padded + columns % n_padded).to(tl.float32)
                total += tl.dot(weights, values, input_precision="ieee") * of_group[:, None]
    if BITS == 8 or GROUP == 0:
        total *= tl.load(scale + columns % n_padded).to(tl.float32)[:, None]
    if SPLIT_K == 1:
        total += row_vector(bias, columns, columns < n)[:, None]
    store_tile(y + part.to(tl.int64) * m * n, tl.trans(total), rows, columns, m, n)


@triton.jit(do_not_specialize=["m"])
def a16_sum_kernel(parts, bias, y, m, n, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one row of y: the sum of the parts (SPLIT_K, m, n), in order, plus the bias."""
    row, columns = row_block(n, BLOCK)
    at = row.to(tl.int64) * n + columns
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(SPLIT_K):
        total += tl.load(parts + part * m.to(tl.int64) * n + at, mask=columns < n, other=0)
    total += row_vector(bias, columns, columns < n)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=columns < n)


def multiply(
    x: Tensor, weight: dict[str, Tensor], bias: Tensor | None, out: Tensor, scheme: Scheme, config: Config
) -> None:
    """Writes out (M, N), contiguous, from x (M, K) with unit stride along K; weight: the sections of its layout."""
    (m, n), k = out.shape, x.shape[1]
    if not m:
        return
    codes, scale = weight["codes"], weight["scale"]
    n_padded, group = scale.shape[-1], scheme.group_size or 0
    k_padded = codes.numel() * (8 // scheme.weight_bits) // n_padded
    split, step = config.split_k, min(config.bk, group or config.bk)
    to = out if split == 1 else out.new_empty((split, m, n), dtype=torch.float32)
    with current(out):
        launch(
            a16_kernel, (config.tiles(m, n), split),
            x, codes, scale, weight.get("zero_point"), bias, to, x.stride(0), m, n, k, n_padded, k_padded,
            BITS=scheme.weight_bits, GROUP=group, COMPUTE=compute_type(x.dtype),
            BM=config.bm, BN=config.bn, BK=step, SPLIT_K=split,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
        if split > 1:
            launch(
                a16_sum_kernel,
                (triton.cdiv(n, _SUM_BLOCK) * m,),
                to,
                bias,
                out,
                m,
                n,
                SPLIT_K=split,
                BLOCK=_SUM_BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
            )


class A16Plan(ReplayedPlan):
    """The kernel for one weight shape. Accumulates in float32."""

    def launch(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        scheme, n, k = self._shape
        rows = x.reshape(-1, k)
        weight = layouts.views(packed, "rows8" if scheme.weight_bits == 8 else "frag4", scheme, n, k)
        config = choose(f"{scheme.family}_triton", len(rows), n, k, machine(x.device))
        multiply(rows, weight, bias, out.view(-1, n), scheme, config)
