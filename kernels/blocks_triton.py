"""Block-sparse: y = x w^T + bias over the stored blocks of w alone, int8 codes (bsw8a8) or bf16, fp16 and fp32 values.

    w: start int32 (strips + 1,), index int32 (blocks,), values (blocks, R, C), R and C powers of two, layout bsr8
    int8: x codes (M, k_padded) and what w8a8_triton takes beside them; y has the bits of the CPU's kernels
    float: x (M, K), values of its dtype; y = sums in float32 + bias

A program has a strip of outputs and BM rows. The block is the first operand of tl.dot and y transposed its result, so that
a few rows fill a multiply: IMMA and HMMA, IGMMA and HGMMA on sm_90 for blocks of 64 rows and more. Few rows are bound by
the read of the blocks, many by the multiplies, or by x where blocks are small.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..layouts import blocks as blocks_gpu
from ..weights.scheme import Scheme
from .configs import bucket
from .launch import compute_type, current, machine
from .quantize_triton import Codes, quantize
from .replay import ReplayedPlan, launch
from .tiles import finish_w8a8, row_vector, store_tile

NAME = "bsw8a8_triton"
# Rows of y that a program takes at most; bytes of shared memory for the blocks in flight, at most; bytes of those that are
# kept for the blocks' column numbers.
MOST_ROWS, _MOST_SHARED, _PLACES = 128, 160 << 10, 1 << 10


@dataclass(frozen=True)
class BlockShape:
    """rows x columns weights, of which `of_rows` x `of_columns` are the layer's and the rest padding."""

    rows: int
    columns: int
    of_rows: int
    of_columns: int


@triton.jit(do_not_specialize=["m"])
def blocks_kernel(
    x,
    start,
    index,
    values,
    act_scale,
    act_zero,
    scale,
    column_sum,
    bias,
    y,
    stride_x,
    m,
    n,
    k,
    OF_ROWS: tl.constexpr,
    OF_COLUMNS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
):
    """k: inputs that a row of x has. COMPUTE: what the products are computed in."""
    strips = tl.cdiv(n, OF_ROWS)
    strip = tl.program_id(0) % strips
    rows = tl.program_id(0) // strips * BM + tl.arange(0, BM)
    places, ks = tl.arange(0, R), tl.arange(0, C)
    columns = tl.where(places < OF_ROWS, strip * OF_ROWS + places, n)
    x += (rows % m).to(tl.int64)[None, :] * stride_x + ks[:, None]
    values += places[:, None] * C + ks[None, :]
    INT8: tl.constexpr = COMPUTE.is_int8()
    SUM: tl.constexpr = tl.int32 if INT8 else tl.float32
    total = tl.zeros((R, BM), SUM)
    # Of 64 bits, as the blocks' offsets are.
    first, end = tl.load(start + strip).to(tl.int64), tl.load(start + strip + 1).to(tl.int64)
    for block in range(first, end):
        begin = tl.load(index + block) * OF_COLUMNS
        weights = tl.load(values + block * (R * C))
        activations = tl.load(x + begin, mask=(ks < OF_COLUMNS)[:, None] & (ks < k - begin)[:, None], other=0)
        total = tl.dot(weights.to(COMPUTE), activations.to(COMPUTE), total, input_precision="ieee", out_dtype=SUM)
    if INT8:
        if y.dtype.element_ty == tl.int32:
            store_tile(y, tl.trans(total), rows, columns, m, n)
        else:
            finish_w8a8(tl.trans(total), rows, columns, m, n, act_scale, act_zero, scale, column_sum, bias, y)
    else:
        total += row_vector(bias, columns, columns < n)[:, None]
        store_tile(y, tl.trans(total), rows, columns, m, n)


def rows_of(m: int) -> int:
    """Rows of y that a program takes, for m of them."""
    return min(MOST_ROWS, bucket(m))


def stages_of(shape: BlockShape, rows: int, itemsize: int, shared: int) -> int:
    """Stages that keep four blocks in flight, or as many as fit in the shared memory that a block of threads may have: a
    block of weights takes two, one for its place."""
    room = min(_MOST_SHARED, shared - _PLACES)
    return 2 * max(1, min(4, room // ((shape.rows + rows) * shape.columns * itemsize)))


def multiply_codes(x: Codes, weight: dict[str, Tensor], bias: Tensor | None, out: Tensor, shape: BlockShape) -> None:
    """out (M, N), contiguous, from the codes of the activations; weight: the sections of bsr8.

    int32 out takes the products, without scales and bias.
    """
    _launch(x.codes, weight, (x.scale, x.zero, weight["scale"], weight["column_sum"], bias, out), shape, tl.int8)


def multiply(x: Tensor, weight: dict[str, Tensor], bias: Tensor | None, out: Tensor, shape: BlockShape) -> None:
    """out (M, N), contiguous, from x (M, K), unit stride along K; weight: start, index and codes of x's dtype."""
    _launch(x, weight, (None, None, None, None, bias, out), shape, compute_type(x.dtype))


def _launch(
    x: Tensor, weight: dict[str, Tensor], rest: tuple[Tensor | None, ...], shape: BlockShape, compute: tl.dtype
) -> None:
    out = rest[-1]
    assert out is not None, "the callers above give it"  # noqa: S101
    m, n = out.shape
    if not m:
        return
    rows = rows_of(m)
    strips = triton.cdiv(n, shape.of_rows)
    with current(out):
        launch(
            blocks_kernel, (strips * triton.cdiv(m, rows),),
            x, weight["start"], weight["index"], weight["codes"], *rest, x.stride(0), m, n, x.shape[1],
            OF_ROWS=shape.of_rows, OF_COLUMNS=shape.of_columns, R=shape.rows, C=shape.columns, COMPUTE=compute, BM=rows,
            num_warps=8 if shape.rows * rows >= 128 * 128 else 4,
            num_stages=stages_of(shape, rows, x.element_size(), machine(x.device).shared), enable_fp_fusion=False,
        )  # fmt: skip


class BlocksPlan(ReplayedPlan):
    """bsw8a8 bound to a weight's shape; int32 out takes the products of the codes."""

    def __init__(self, scheme: Scheme, out_features: int, in_features: int) -> None:
        super().__init__(scheme, out_features, in_features)
        block = blocks_gpu.block_of(scheme)
        self._block = BlockShape(*blocks_gpu.padded(block), block.rows, block.columns)

    def launch(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        _, n, k = self._shape
        weight = blocks_gpu.views(packed, *self._shape)
        multiply_codes(quantize(x.reshape(-1, k), -(-k // 16) * 16), weight, bias, out.view(-1, n), self._block)
