"""Inputs of attention of many kinds, and its result in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native


def draw(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """q, k and v as views of projections: tokens first."""
    batch, heads, kv_heads, queries, keys, width, value_width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, value_width))
    return [torch.randn(batch, *size, generator=generator).to(dtype).transpose(1, 2) for size in sizes]


def run(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    scales: tuple[Tensor, Tensor] | None = None,
    int8: str = "",
) -> Tensor:
    """The kernel of this name, on what attention() passes to the one that it chooses. int8: the kernel of 8 bits beside it."""
    batch, heads, queries, width = q.shape
    out = torch.full((batch, queries, heads, v.shape[3]), math.nan, dtype=q.dtype).transpose(1, 2)
    mask = None if mask is None else mask.expand(batch, heads, queries, k.shape[2])
    how = native.AttentionHow(width**-0.5 if scale is None else scale, causal, window, scales, int8)
    native.attention(kernel, q, k, v, out, mask, slopes, how)
    return out


def visible(queries: int, keys: int, causal: bool = False, window: int = 0) -> tuple[Tensor, Tensor]:
    """Which query sees which key."""
    distance = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen &= distance <= 0
    if window:
        seen &= distance > -window
    return seen, distance


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
) -> Tensor:
    """In float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    seen, distance = visible(q.shape[2], k.shape[2], causal, window)
    if slopes is not None:
        scores = scores + slopes.double()[:, None, None] * distance
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.where(scores == -math.inf, 0, scores.softmax(-1)) @ v


def masks(shape: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Masks of every kind, by name: keyword arguments."""
    batch, heads, _, queries, keys, _, _ = shape
    generator = torch.Generator().manual_seed(1)
    bits = torch.rand(batch, 1, queries, keys, generator=generator) > 0.3
    bits[..., keys * 2 // 3 + 1 :] = False
    floats = torch.randn(batch, 1, queries, keys, generator=generator).masked_fill(~bits, -math.inf)
    padding = torch.arange(keys) < torch.randint(1, keys + 1, (batch, 1, 1, 1), generator=generator)
    left = torch.arange(keys) >= torch.randint(0, keys, (batch, 1, 1, 1), generator=generator)
    slopes = torch.rand(heads, generator=generator)
    return {
        "none": {},
        "scale": {"scale": 0.3},
        "causal": {"causal": True},
        "window": {"causal": True, "window": 5},
        "bool": {"mask": bits},
        "per head": {"mask": torch.rand(1, heads, queries, keys, generator=generator) > 0.5},
        "float": {"mask": floats},
        "bfloat16": {"mask": floats.bfloat16()},
        "float16": {"mask": floats.half()},
        "padding": {"mask": padding},
        "left padding": {"mask": left, "causal": True},
        "padding, float": {"mask": torch.zeros(padding.shape).masked_fill(~padding, -math.inf)},
        "one for all keys": {"mask": floats[..., :1]},
        "strided": {"mask": bits.mT.contiguous().mT},
        "two dimensions": {"mask": bits[0, 0]},
        "slopes": {"slopes": slopes, "causal": True},
        "slopes, both ways": {"slopes": -slopes / 256},
    }


def codes_of(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes of keys or values and their scales, with gaps between the scales; and what they stand for."""
    scale = tensor.float().abs().amax(-1) / 127
    codes = (tensor.float() / scale[..., None]).round().to(torch.int8)
    apart = torch.full((*scale.shape, 3), math.nan)
    apart[..., 1] = scale
    return codes, apart[..., 1], codes.double() * scale.double()[..., None]
