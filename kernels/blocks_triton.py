"""Block-sparse: y = x w^T + bias over the stored blocks of w only, int8 codes (bsw8a8) or bf16, fp16 and fp32 values.

    w: start int32 (strips + 1,), index int32 (blocks,), values (blocks, R, C), R and C powers of two, layout bsr8
    int8: x codes (M, k_padded) and the operands of w8a8_triton; y is bit-identical to the CPU kernels
    float: x (M, K), values of its dtype; sums in float32

A program computes one strip of outputs for BM rows. The block is the first operand of tl.dot and the result is y
transposed, so that a few rows fill an instruction: IMMA and HMMA, on sm_90 IGMMA and HGMMA for blocks of 64 rows or more.
Few rows are bound by reading the blocks, many by the multiplies, or by reading x where blocks are small.
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
# Largest number of rows of y per program; largest shared memory, in bytes, for the blocks in flight; bytes reserved for
# the blocks' column indices.
MOST_ROWS, _MOST_SHARED, _INDEX_BYTES = 128, 160 << 10, 1 << 10


@dataclass(frozen=True)
class BlockShape:
    """A stored block of rows x columns weights: the layer's block of of_rows x of_columns, padded."""

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
    """k: inputs in a row of x. COMPUTE: dtype of the multiplied operands."""
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
    # 64-bit, because block offsets can exceed 2^31.
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
    """Rows of y per program, for m rows in all."""
    return min(MOST_ROWS, bucket(m))


def stages_of(shape: BlockShape, rows: int, itemsize: int, shared: int) -> int:
    """Pipeline stages that keep four blocks in flight, or as many as fit into `shared` bytes of shared memory. A block
    takes two stages: one loads its column index, one its weights."""
    room = min(_MOST_SHARED, shared - _INDEX_BYTES)
    return 2 * max(1, min(4, room // ((shape.rows + rows) * shape.columns * itemsize)))


def multiply_codes(x: Codes, weight: dict[str, Tensor], bias: Tensor | None, out: Tensor, shape: BlockShape) -> None:
    """Writes out (M, N), contiguous, from the quantized activations; weight: the sections of bsr8.

    An int32 out receives the integer products, without scales and bias.
    """
    _launch(x.codes, weight, (x.scale, x.zero, weight["scale"], weight["column_sum"], bias, out), shape, tl.int8)


def multiply(x: Tensor, weight: dict[str, Tensor], bias: Tensor | None, out: Tensor, shape: BlockShape) -> None:
    """Writes out (M, N), contiguous, from x (M, K), unit stride along K; weight: start, index and codes of x's dtype."""
    _launch(x, weight, (None, None, None, None, bias, out), shape, compute_type(x.dtype))


def _launch(
    x: Tensor, weight: dict[str, Tensor], rest: tuple[Tensor | None, ...], shape: BlockShape, compute: tl.dtype
) -> None:
    out = rest[-1]
    assert out is not None, "both callers pass it"  # noqa: S101
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
    """bsw8a8 for one weight shape. An int32 out receives the integer products."""

    def __init__(self, scheme: Scheme, out_features: int, in_features: int) -> None:
        super().__init__(scheme, out_features, in_features)
        block = blocks_gpu.block_of(scheme)
        self._block = BlockShape(*blocks_gpu.padded(block), block.rows, block.columns)

    def launch(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        _, n, k = self._shape
        weight = blocks_gpu.views(packed, *self._shape)
        multiply_codes(quantize(x.reshape(-1, k), -(-k // 16) * 16), weight, bias, out.view(-1, n), self._block)
