"""The cases of gpu_aot: each Triton kernel with each of its configurations, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .. import layouts
from ..kernels import a16_triton, blocks_triton, dequantize_triton, quantize_triton, w4a8_triton, w8a8_triton
from ..kernels.configs import SHIPPED, Config
from ..kernels.quantize_triton import Codes
from ..weights.scheme import Scheme

Launch = Callable[[], object]
# Rows, outputs and inputs of every case: multiples of all block sizes.
M, N, K = 1024, 4096, 4096


def cases(target: str) -> Iterator[tuple[str, Launch]]:
    """(name, function that launches it) for all kernels and configurations of a target."""
    yield from _quantize()
    yield from _dequantize()
    yield from _w8a8(target)
    yield from _w4a8(target)
    yield from _a16(target)
    yield from _blocks()


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _quantize() -> Iterator[tuple[str, Launch]]:
    for k in (128, 4096, 16384):
        yield f"quantize-{k}", partial(quantize_triton.quantize, empty(M, k), k)
    yield "quantize-sums", partial(quantize_triton.quantize, empty(M, K), K, 32, True)
    yield "quantize-total", partial(quantize_triton.quantize, empty(M, K), K, None, True)
    yield "quantize-rms_norm", partial(quantize_triton.rms_norm_quantize, empty(M, K), empty(K), 1e-6, K)
    yield "quantize-silu_mul", partial(quantize_triton.silu_mul_quantize, empty(M, K), empty(M, K), K)


def _dequantize() -> Iterator[tuple[str, Launch]]:
    for name in (
        "w8a16",
        "w4a16",
        "w4a16g32",
        "w4a16g32asym",
        "w4a16g128asym",
        "sp24w8a16",
        "sp24w16a16",
        "sp24w4a16g32",
        "sp24w4a16g128",
    ):
        scheme = Scheme.parse(name)
        packed = _packed(dequantize_triton.layout_of(scheme), scheme)
        yield f"dequantize-{name}", partial(dequantize_triton.dequantize, packed, scheme, N, K, torch.bfloat16)


def _w8a8(target: str) -> Iterator[tuple[str, Launch]]:
    weight = _sections("rows8", Scheme.parse("w8a8"))
    for name, config in _configs(w8a8_triton.NAME, target):
        yield name, partial(w8a8_triton.multiply, _codes(), weight, empty(N), empty(M, N), config)


def _w4a8(target: str) -> Iterator[tuple[str, Launch]]:
    for scheme in map(Scheme.parse, ("w4a8", "w4a8g32", "w4a8g128asym")):
        weight, codes = _sections(w4a8_triton.LAYOUT, scheme), _codes(scheme.groups(K))
        for name, config in _configs(w4a8_triton.NAME, target, scheme):
            yield name, partial(w4a8_triton.multiply, codes, weight, empty(N), empty(M, N), scheme, config)


def _a16(target: str) -> Iterator[tuple[str, Launch]]:
    for scheme in map(Scheme.parse, ("w8a16", "w4a16", "w4a16g32", "w4a16g128asym")):
        weight = _sections(dequantize_triton.layout_of(scheme), scheme)
        for name, config in _configs(f"{scheme.family}_triton", target, scheme):
            yield name, partial(a16_triton.multiply, empty(M, K), weight, empty(N), empty(M, N), scheme, config)


def _blocks() -> Iterator[tuple[str, Launch]]:
    for size, m in ((32, 16), (32, 128), (64, 16), (64, 128), (128, 16), (128, 128)):
        shape = blocks_triton.BlockShape(size, size, size, size)
        weight = {
            "start": empty(N // size + 1, dtype=torch.int32),
            "index": empty(99, dtype=torch.int32),
            "scale": empty(N, dtype=torch.float32),
            "column_sum": empty(N, dtype=torch.int32),
        }
        int8 = {**weight, "codes": empty(99, size, size, dtype=torch.int8)}
        out, name = empty(m, N), f"{size}x{m}x{size}"
        yield f"bsw8a8_triton-{name}", partial(blocks_triton.multiply_codes, _codes(m=m), int8, empty(N), out, shape)
        bf16 = {**weight, "codes": empty(99, size, size)}
        yield f"blocks_bf16-{name}", partial(blocks_triton.multiply, empty(m, K), bf16, empty(N), out, shape)


def _configs(kernel: str, target: str, scheme: Scheme | None = None) -> Iterator[tuple[str, Config]]:
    """(case name, configuration); the name ends in tile sizes and split-K."""
    of = f"-{scheme}" if scheme else ""
    for config in SHIPPED[kernel].on(target):
        yield f"{kernel}{of}-{config.bm}x{config.bn}x{config.bk}x{config.split_k}", config


def _packed(layout: str, scheme: Scheme) -> Tensor:
    return empty(layouts.packed_nbytes(layout, scheme, N, K), dtype=torch.uint8)


def _sections(layout: str, scheme: Scheme) -> dict[str, Tensor]:
    return layouts.views(_packed(layout, scheme), layout, scheme, N, K)


def _codes(groups: int = 0, m: int = M) -> Codes:
    scale, zero = empty(m, dtype=torch.float32), empty(m, dtype=torch.int32)
    sums = empty(m, groups, dtype=torch.int32) if groups else None
    return Codes(empty(m, K, dtype=torch.int8), scale, zero, sums)
