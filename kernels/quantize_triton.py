"""Dynamic per-token quantization of activations to int8, alone or fused with RMSNorm or SiLU * up.

    x = (codes - zero) * scale, bit-identical to reference.quantize_activations
    values v (M, K): x | x * rsqrt(mean(x^2) + eps) * weight | silu(gate) * up, kept in float32 before quantization
    codes int8 (M, k_padded), 0 from K on; scale float32 (M,); zero int32 (M,); sums int32 (M, groups) of the codes

A program handles one row: it finds the range (after RMSNorm's sum of squares), then the codes. Each pass loads the
values again, from the L1 cache. Bound by reading x and writing the codes. A row with a NaN or an Inf gets codes 0 and
scale NaN. Fused multiply-adds are off, because they would skip a rounding step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import current
from .replay import launch

# Adding it rounds a float32 below 2^22 to an integer, half to even.
_SHIFT = tl.constexpr(1.5 * 2**23)
_TINY, _TINY_FACTOR = tl.constexpr(2.0**-100), tl.constexpr(2.0**100)
_HUGE, _HUGE_FACTOR = tl.constexpr(2.0**126), tl.constexpr(2.0**-4)
# Limits of the values processed at a time; the largest holds a whole row of most language models.
LARGEST_BLOCK, LEAST_BLOCK = 8192, 128


class Codes(NamedTuple):
    """Quantized activations; sums is None unless requested."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    sums: Tensor | None


@triton.jit
def _values(x, second, at, inside, inverse_rms, INPUT: tl.constexpr):
    """float32 values of a row; second: RMSNorm's weight, or `up` of SiLU * up."""
    v = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if INPUT == "rms_norm":
        v = v * inverse_rms * tl.load(second + at, mask=inside, other=0).to(tl.float32)
    elif INPUT == "silu_mul":
        v = v / (1 + tl.exp(-v)) * tl.load(second + at, mask=inside, other=0).to(tl.float32)
    return v


@triton.jit
def _inverse_rms(x, k, eps, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, k, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        v = tl.load(x + at, mask=at < k, other=0).to(tl.float32)
        total += v * v
    return 1 / tl.sqrt_rn(tl.sum(total) / k + eps)


@triton.jit
def _plan(low, high, finite):
    """inverse, factor, scale and zero point of a row with range [low, high]; see reference.quantize_activations."""
    magnitude = tl.maximum(-low, high)
    factor = tl.where(magnitude < _TINY, _TINY_FACTOR, tl.where(magnitude > _HUGE, _HUGE_FACTOR, 1.0))
    live = (magnitude > 0) & finite
    width = tl.where(live, high * factor - low * factor, 1.0)
    inverse = tl.where(live, tl.div_rn(tl.full((), 255.0, tl.float32), width), 0.0)
    zero = tl.where(live, (-low * factor * inverse + _SHIFT) - _SHIFT - 128, 0.0)
    scale = tl.where(live, tl.div_rn(tl.div_rn(width, tl.full((), 255.0, tl.float32)), factor), 0.0)
    return inverse, factor, tl.where(finite, scale, float("nan")), zero


@triton.jit
def quantize_kernel(
    x,
    second,
    codes,
    scale,
    zero,
    sums,
    stride_x,
    stride_second,
    k,
    k_padded,
    eps,
    INPUT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """stride_second: 0 if all rows share `second`. GROUP: inputs per sum, a divisor of BLOCK; 0: one sum per row."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride_x
    codes += row * k_padded
    inverse_rms = 1.0
    if second is not None:
        second += row * stride_second
    if INPUT == "rms_norm":
        inverse_rms = _inverse_rms(x, k, eps, BLOCK)

    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, k, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        v = _values(x, second, at, at < k, inverse_rms, INPUT)
        finite = tl.abs(v) < float("inf")
        bad = tl.where(finite, bad, 1)
        v = tl.where(finite, v, 0.0)
        low = tl.minimum(low, v)
        high = tl.maximum(high, v)
    finite = tl.max(bad) == 0
    inverse, factor, row_scale, row_zero = _plan(tl.min(low), tl.max(high), finite)
    tl.store(scale + row, row_scale)
    tl.store(zero + row, row_zero.to(tl.int32))

    total = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, k_padded, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        v = _values(x, second, at, at < k, inverse_rms, INPUT)
        v = tl.where(finite, v, 0.0) * factor * inverse
        rounded = tl.minimum((v + _SHIFT) - _SHIFT + row_zero, 127.0).to(tl.int32)
        rounded = tl.where(at < k, rounded, 0)
        tl.store(codes + at, rounded.to(tl.int8), mask=at < k_padded)
        if sums is not None:
            if GROUP == 0:
                total += rounded
            else:
                groups = k_padded // GROUP
                group = begin // GROUP + tl.arange(0, BLOCK // GROUP)
                of_group = tl.sum(tl.reshape(rounded, (BLOCK // GROUP, GROUP)), 1)
                tl.store(sums + row * groups + group, of_group, mask=group < groups)
    if sums is not None and GROUP == 0:
        tl.store(sums + row, tl.sum(total))


def quantize(x: Tensor, k_padded: int, group_size: int | None = None, sums: bool = False) -> Codes:
    """Quantizes activations (M, K) of float32, bfloat16 or float16, unit stride along K.

    k_padded: columns of the codes, at least K; with sums, a multiple of group_size.
    sums: also compute the sums of the codes over each group of group_size inputs (None: over the row).
    """
    return _quantize(x, None, 0, 0.0, "plain", (k_padded, group_size, sums))


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, k_padded: int, group_size: int | None = None, sums: bool = False
) -> Codes:
    """Quantizes RMSNorm(x) * weight (K,); otherwise like `quantize`."""
    return _quantize(x, weight, 0, eps, "rms_norm", (k_padded, group_size, sums))


def silu_mul_quantize(
    gate: Tensor, up: Tensor, k_padded: int, group_size: int | None = None, sums: bool = False
) -> Codes:
    """Quantizes silu(gate) * up, both (M, K) with unit stride along K; otherwise like `quantize`."""
    return _quantize(gate, up, up.stride(0), 0.0, "silu_mul", (k_padded, group_size, sums))


def block_of(k: int) -> tuple[int, int]:
    """Block size for rows of k values, and warps per program: at most 16 values per thread."""
    block = min(LARGEST_BLOCK, max(LEAST_BLOCK, triton.next_power_of_2(k)))
    return block, max(1, min(16, block // 512))


def _quantize(
    x: Tensor, second: Tensor | None, stride_second: int, eps: float, kind: str, form: tuple[int, int | None, bool]
) -> Codes:
    k_padded, group_size, with_sums = form
    m, k = x.shape
    codes = x.new_empty((m, k_padded), dtype=torch.int8)
    scale, zero = x.new_empty(m, dtype=torch.float32), x.new_empty(m, dtype=torch.int32)
    sums = x.new_empty((m, k_padded // (group_size or k_padded)), dtype=torch.int32) if with_sums else None
    block, warps = block_of(k_padded)
    if m:
        with current(x):
            launch(
                quantize_kernel, (m,),
                x, second, codes, scale, zero, sums, x.stride(0), stride_second, k, k_padded, eps,
                INPUT=kind, GROUP=group_size or 0, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return Codes(codes, scale, zero, sums)
