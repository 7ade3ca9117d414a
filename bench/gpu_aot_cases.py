"""What gpu_aot compiles: each kernel with each of its configurations, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..kernels import quantize_triton, w8a8_triton
from ..kernels.configs import SHIPPED, Config

Launch = Callable[[], object]
# Rows, outputs and inputs of every case: divided by every block.
M, N, K = 1024, 4096, 4096


def cases(target: str) -> Iterator[tuple[str, Launch]]:
    """(name, what launches it) of everything that ships for a target."""
    yield from _quantize()
    yield from _w8a8(target)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _quantize() -> Iterator[tuple[str, Launch]]:
    for k in (128, 4096, 16384):
        yield f"quantize-{k}", partial(quantize_triton.quantize, empty(M, k), k)
    yield "quantize-sums", partial(quantize_triton.quantize, empty(M, K), K, 32, True)
    yield "quantize-total", partial(quantize_triton.quantize, empty(M, K), K, None, True)
    yield "quantize-rms_norm", partial(quantize_triton.rms_norm_quantize, empty(M, K), empty(K), 1e-6, K)
    yield "quantize-silu_mul", partial(quantize_triton.silu_mul_quantize, empty(M, K), empty(M, K), K)


def codes_of(m: int, k: int) -> quantize_triton.Codes:
    scale, zero = empty(m, dtype=torch.float32), empty(m, dtype=torch.int32)
    return quantize_triton.Codes(empty(m, k, dtype=torch.int8), scale, zero, None)


def configs(kernel: str, target: str) -> Iterator[tuple[str, Config]]:
    for config in SHIPPED[kernel].on(target):
        yield f"{kernel}-{config.bm}x{config.bn}x{config.bk}x{config.split_k}", config


def _w8a8(target: str) -> Iterator[tuple[str, Launch]]:
    weight = {
        "codes": empty(N, K, dtype=torch.int8),
        "scale": empty(N, dtype=torch.float32),
        "column_sum": empty(N, dtype=torch.int32),
    }
    for name, config in configs(w8a8_triton.NAME, target):
        yield name, partial(w8a8_triton.multiply, codes_of(M, K), weight, empty(N), empty(M, N), config)
