"""y = (x codes . w codes - act_zero * column_sum) * (act_scale * scale) + bias, or only the int32 products.

    x (M, K) float -> codes int8 (M, k_padded), act_scale float32 (M,), act_zero int32 (M,)   (quantize_triton)
    w int8 (N_padded, k_padded) row by row; scale float32 and column_sum int32 (N_padded,); bias (N,); y (M, N)

Built on the int8 tl.dot, both operands K-major: IMMA, on sm_90 IGMMA from 64 rows on. Few rows are bound by reading w: K
is then split over programs (split-K), and a second kernel adds their int32 sums. Many rows are bound by the multiplies.
The epilogue has the operations and order of the CPU kernels, so the result is bit-identical to theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import layouts
from .configs import Config, choose
from .launch import current, machine
from .quantize_triton import Codes, quantize
from .replay import ReplayedPlan, launch
from .tiles import finish_w8a8, row_block, store_tile, tile_of

NAME = "w8a8_triton"
LAYOUT = "rows8"
# Elements per program of the kernel that adds the parts.
_SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["m"])
def w8a8_kernel(
    x,
    w,
    act_scale,
    act_zero,
    scale,
    column_sum,
    bias,
    y,
    m,
    n,
    k,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """k: padded. WHOLE_K: BK divides k. An int32 y receives the products of the SPLIT_K parts, (SPLIT_K, m, n)."""
    tile_row, tile_column = tile_of(m, n, BM, BN)
    rows, columns, ks = tile_row * BM + tl.arange(0, BM), tile_column * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows and columns beyond the edge wrap around; their results are not stored.
    x += (rows % m).to(tl.int64)[:, None] * k + ks[None, :]
    w += (columns % n).to(tl.int64)[None, :] * k + ks[:, None]
    products = tl.zeros((BM, BN), tl.int32)
    steps = tl.cdiv(tl.cdiv(k, BK), SPLIT_K)
    part = tl.program_id(1)
    for begin in range(part * steps * BK, tl.minimum((part + 1) * steps * BK, k), BK):
        if WHOLE_K:
            codes, weights = tl.load(x + begin), tl.load(w + begin)
        else:
            codes = tl.load(x + begin, mask=ks[None, :] < k - begin, other=0)
            weights = tl.load(w + begin, mask=ks[:, None] < k - begin, other=0)
        products = tl.dot(codes, weights, products, out_dtype=tl.int32)
    if y.dtype.element_ty == tl.int32:
        store_tile(y + part.to(tl.int64) * m * n, products, rows, columns, m, n)
    else:
        finish_w8a8(products, rows, columns, m, n, act_scale, act_zero, scale, column_sum, bias, y)


@triton.jit(do_not_specialize=["m"])
def w8a8_sum_kernel(
    parts, act_scale, act_zero, scale, column_sum, bias, y, m, n, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of one row of y from the int32 parts (SPLIT_K, m, n)."""
    row, columns = row_block(n, BLOCK)
    rows = row + tl.arange(0, 1)
    at = row.to(tl.int64) * n + columns
    products = tl.zeros((BLOCK,), tl.int32)
    for part in range(SPLIT_K):
        products += tl.load(parts + part * m.to(tl.int64) * n + at, mask=columns < n, other=0)
    if y.dtype.element_ty == tl.int32:
        store_tile(y, products[None, :], rows, columns, m, n)
    else:
        finish_w8a8(products[None, :], rows, columns, m, n, act_scale, act_zero, scale, column_sum, bias, y)


def multiply(x: Codes, weight: dict[str, Tensor], bias: Tensor | None, out: Tensor, config: Config) -> None:
    """Writes out (M, N), contiguous, from quantized activations; weight: codes, scale and column_sum of rows8.

    An int32 out receives the integer products, without scales and bias.
    """
    (m, n), k = out.shape, x.codes.shape[1]
    if not m:
        return
    split = config.split_k
    to = out if split == 1 else out.new_empty((split, m, n), dtype=torch.int32)
    rest = (x.scale, x.zero, weight["scale"], weight["column_sum"], bias)
    with current(out):
        launch(
            w8a8_kernel, (config.tiles(m, n), split),
            x.codes, weight["codes"], *rest, to, m, n, k, **config.blocks(), SPLIT_K=split, WHOLE_K=k % config.bk == 0,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
        )  # fmt: skip
        if split > 1:
            launch(
                w8a8_sum_kernel, (triton.cdiv(n, _SUM_BLOCK) * m,),
                to, *rest, out, m, n, SPLIT_K=split, BLOCK=_SUM_BLOCK, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


class W8A8Plan(ReplayedPlan):
    """The kernel for one weight shape. An int32 out receives the integer products."""

    def launch(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        _, n, k = self._shape
        rows, weight = x.reshape(-1, k), layouts.views(packed, LAYOUT, *self._shape)
        codes = quantize(rows, weight["codes"].shape[1])
        config = choose(NAME, len(rows), n, codes.codes.shape[1], machine(x.device))
        multiply(codes, weight, bias, out.view(-1, n), config)
