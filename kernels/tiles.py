"""Shared by the matrix kernels: the mapping of programs to tiles, loads and stores at edges, the w8a8 epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of tiles that run at the same time, so that they share the weights in the L2 cache.
_GROUP_M = tl.constexpr(8)


@triton.jit
def tile_of(m, n, BM: tl.constexpr, BN: tl.constexpr):
    """Row and column of this program's tile, ordered down _GROUP_M rows of tiles, then to the next column."""
    program = tl.program_id(0)
    tall, wide = tl.cdiv(m, BM), tl.cdiv(n, BN)
    first = program // (_GROUP_M * wide) * _GROUP_M
    height = tl.minimum(tall - first, _GROUP_M)
    within = program % (_GROUP_M * wide)
    return first + within % height, within // height


@triton.jit
def row_block(n, BLOCK: tl.constexpr):
    """This program's row and block of columns. Both share the grid's first axis: the others are too small for all rows."""
    program, blocks = tl.program_id(0), tl.cdiv(n, BLOCK)
    return program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def row_vector(p, at, inside):
    """p[at] as float32, 0 where not `inside`; all 0 if p is None."""
    if p is None:
        return tl.zeros(at.shape, tl.float32)
    else:
        return tl.load(p + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def store_tile(y, values, rows, columns, m, n):
    """Stores values (rows, columns) to y (m, n), contiguous, in y's dtype; skips positions outside y."""
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    at = rows[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(y + at, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def finish_w8a8(products, rows, columns, m, n, act_scale, act_zero, scale, column_sum, bias, y):
    """y = (products - act_zero * column_sum) * (act_scale * scale) + bias, in the order of the CPU kernels."""
    zero = tl.load(act_zero + rows, mask=rows < m, other=0)
    row_scale = tl.load(act_scale + rows, mask=rows < m, other=0)
    column_scale = tl.load(scale + columns, mask=columns < n, other=0)
    sums = tl.load(column_sum + columns, mask=columns < n, other=0)
    offset = tl.broadcast_to(row_vector(bias, columns, columns < n)[None, :], products.shape)
    centred = (products - zero[:, None] * sums[None, :]).to(tl.float32)
    store_tile(y, tl.fma(centred, row_scale[:, None] * column_scale[None, :], offset), rows, columns, m, n)
