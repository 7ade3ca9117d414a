"""GPU operations other than products: dequantizing weights, and quantizing activations, alone or fused with the previous
operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from ..dispatch import reference
from ..kernels import dequantize_triton, quantize_triton
from ..weights.activation_type import activation_types
from ..weights.rounding import dequantize_weight
from ..weights.scheme import Scheme
from . import gpu_timing, gpu_weights
from .gpu_timing import Call
from .weights import WeightKind

Row = dict[str, Any]
_EPSILON = 1e-6
# Largest share of codes that may differ from the reference by one, because of ties in float32.
_AT_TIES = 0.01
# Largest relative difference of a token's scale from the reference; both are float32.
_SCALE = 1e-6


def calls(what: str, m: int, n: int, k: int, device: str = "cuda") -> tuple[list[Call], int]:
    """Calls of an operation on enough copies of its inputs to exceed the cache, and the bytes that one call moves.

    what: "dequantize SCHEME" for a weight (n, k) to bfloat16, or a function of quantize_triton for rows (m, k).

    Raises:
        ValueError: unknown operation.
        RuntimeError: its result is wrong.
    """
    if what.startswith("dequantize "):
        return _dequantize(Scheme.parse(what.removeprefix("dequantize ")), n, k, device)
    if what not in _ROWS:
        raise ValueError(f"what={what!r}: must be 'dequantize SCHEME' or one of {', '.join(_ROWS)}")
    return _quantize(what, m, k, device)


def operation(what: str, m: int, n: int, k: int, device: str = "cuda") -> Row:
    """Times its kernel twice (A/A), and computes GB/s. Raises like `calls`."""
    made, moved = calls(what, m, n, k, device)
    sample, again = gpu_timing.in_graph(made), gpu_timing.in_graph(made)
    return {
        **asdict(sample),
        "again_us": again.us,
        "gbps": moved / sample.us / 1e3,
        "runs": f"{what.split()[0]}_triton",
    }


def _dequantize(scheme: Scheme, n: int, k: int, device: str) -> tuple[list[Call], int]:
    packed, quantized = gpu_weights.packed(WeightKind(scheme), dequantize_triton.layout_of(scheme), n, k, device)

    def one(weight: Tensor) -> Tensor:
        return dequantize_triton.dequantize(weight, scheme, n, k, torch.bfloat16)

    expected = dequantize_weight(quantized, scheme, k)
    if not torch.allclose(one(packed).float(), expected, rtol=2**-7, atol=0):
        raise RuntimeError(f"dequantize {scheme}: wrong weight; not timed")
    moved = packed.nbytes + 2 * n * k
    return [partial(one, packed.clone()) for _ in range(gpu_timing.copies(moved))], moved


def _rows(x: Tensor) -> quantize_triton.Codes:
    return quantize_triton.quantize(x, _padded(x))


def _norm_rows(x: Tensor) -> quantize_triton.Codes:
    return quantize_triton.rms_norm_quantize(x, _weight(x), _EPSILON, _padded(x))


def _gated_rows(x: Tensor) -> quantize_triton.Codes:
    half = x.shape[1] // 2
    return quantize_triton.silu_mul_quantize(x[:, :half], x[:, half:], _padded(x[:, :half]))


def _weight(x: Tensor) -> Tensor:
    return x[0]  # the values do not matter


def _padded(x: Tensor) -> int:
    return -(-x.shape[1] // 128) * 128


# name -> (function, the float32 values that it quantizes, width of its input rows over that of its output rows)
_ROWS: dict[str, tuple[Callable[[Tensor], quantize_triton.Codes], Callable[[Tensor], Tensor], int]] = {
    "quantize": (_rows, lambda x: x.float(), 1),
    "rms_norm_quantize": (
        _norm_rows,
        lambda x: rms_norm(x.float(), (x.shape[1],), _weight(x).float(), _EPSILON),
        1,
    ),
    "silu_mul_quantize": (_gated_rows, lambda x: silu(x.float().chunk(2, 1)[0]) * x.float().chunk(2, 1)[1], 2),
}


def _quantize(what: str, m: int, k: int, device: str) -> tuple[list[Call], int]:
    one, values, wide = _ROWS[what]
    x = torch.randn(m, wide * k, device=device, dtype=torch.bfloat16)
    got, expected = one(x), reference.quantize_activations(values(x), activation_types()[8])
    off = (got.codes[:, :k].int() - expected.codes).abs()
    if off.max() > 1 or (off > 0).float().mean() > _AT_TIES:
        raise RuntimeError(f"{what}: codes differ from the reference; not timed")
    if not torch.allclose(got.scale, expected.scale, rtol=_SCALE, atol=0):
        raise RuntimeError(f"{what}: scales differ from the reference; not timed")
    if (got.zero - expected.zero).abs().max() > 1:
        raise RuntimeError(f"{what}: zero points differ from the reference; not timed")
    moved = x.nbytes + got.codes.nbytes + got.scale.nbytes + got.zero.nbytes
    return [partial(one, x.clone()) for _ in range(gpu_timing.copies(moved))], moved
