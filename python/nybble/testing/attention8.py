"""Attention with products of 8 bits, as its kernels compute it, to the last bit: see csrc/cpu/tile_attention8.h."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_BLOCK = 128  # keys
_LOG2E, _LOWEST, _LEAST = np.float32(1.44269502), np.float32(-3.40282347e38), np.float32(2.0**-100)
_SHIFT = np.float32(1.5 * 2.0**23)
# Of 2^f, and of 255 2^f.
_POWER = ("0x1.5bba14p-10", "0x1.3cea88p-7", "0x1.c6b752p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1", "0x1p0")
_WEIGHT = ("0x1.c23368p+3", "0x1.eeed3cp+5", "0x1.619028p+7", "0x1.fdf69cp+7")

_Array = Any  # of numpy


def attention8(
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
    """As nybble::attention with int8=True, for finite q, k and v. The result has q's dtype."""
    batch, heads, queries, width = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    out = np.empty((batch, heads, queries, v.shape[3]), np.float32)
    natural = slopes is not None or (mask is not None and mask.dtype is not torch.bool)
    factor = np.float32(width**-0.5 if scale is None else scale) * (np.float32(1) if natural else _LOG2E)
    place = np.arange(queries)[:, None] + (keys - queries)
    distance = np.arange(keys) - place
    hidden = (distance > 0 if causal else np.zeros_like(distance, bool)) | (
        (distance <= -window) if window else np.zeros_like(distance, bool)
    )
    added = None if mask is None else _bias(mask.expand(batch, heads, queries, keys))
    for b in range(batch):
        for h in range(heads):
            scores = _scores(q[b, h], k[b, h // group], factor)
            if added is not None:
                scores = scores + added[b, h]
            if slopes is not None:
                scores = _fused(slopes[h].numpy(), distance.astype(np.float32), scores)
            scores = np.where(hidden, np.float32(-np.inf), scores)
            out[b, h] = _weighted(scores, v[b, h // group], natural)
    return torch.from_numpy(out).to(q.dtype)


def _bias(mask: Tensor) -> _Array:
    if mask.dtype is torch.bool:
        return np.where(mask.numpy(), np.float32(0), np.float32(-np.inf))
    return mask.float().numpy()


def _fused(a: _Array, b: _Array, c: _Array) -> _Array:
    """a b + c in one rounding: the product is exact in float64, and the sum is rounded twice, almost never to another
    float32."""
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def _codes(rows: _Array) -> tuple[_Array, _Array]:
    """Codes of rows and their scales."""
    most = np.abs(rows).max(-1, keepdims=True)
    factor = np.where(most < _LEAST, np.float32(0), np.float32(127) / np.maximum(most, _LEAST))
    return np.rint(rows * factor).astype(np.int64), most / np.float32(127)


def _scores(q: Tensor, k: Tensor, factor: Any) -> _Array:
    q_codes, q_scale = _codes(q.float().numpy())
    keys = k.float().numpy()
    center, total = np.zeros(keys.shape[1], np.float32), np.float32(0)
    for key in keys:
        most = np.abs(key).max()
        if most >= _LEAST:
            weight = np.float32(1) / most
            total += weight
            center = _fused(key, weight, center)
    center *= np.float32(1) / total if total > 0 else np.float32(0)
    k_codes, k_scale = _codes(keys - center)
    products = (q_codes @ k_codes.T).astype(np.float32)
    return products * k_scale[:, 0] * (q_scale * factor)


def _power(x: _Array, coefficients: tuple[str, ...]) -> _Array:
    """A polynomial of x - round(x), times 2^round(x)."""
    n = (x + _SHIFT) - _SHIFT
    first, *rest = (np.float32(float.fromhex(one)) for one in coefficients)
    p = np.full_like(x, first)
    for one in rest:
        p = _fused(p, x - n, one)
    return np.ldexp(p, n.astype(np.int32))


def _weighted(scores: _Array, v: Tensor, natural: bool) -> _Array:
    """The values by the weights of the scores, block by block."""
    rows = v.float().numpy()
    unit = _LOG2E if natural else np.float32(1)
    most = np.full((len(scores), 1), _LOWEST)
    out, total = np.zeros((len(scores), rows.shape[1]), np.float32), np.zeros((len(scores), 1), np.float32)
    for begin in range(0, len(rows), _BLOCK):
        block, values = scores[:, begin : begin + _BLOCK], rows[begin : begin + _BLOCK]
        above = np.maximum(most, block.max(-1, keepdims=True))
        weights = np.rint(_power(np.maximum((block - above) * unit, np.float32(-16)), _WEIGHT)).astype(np.int64)
        gone = np.maximum(np.maximum(most - above, np.float32(-1e30)) * unit, np.float32(-127))
        keep = np.where(gone < -126.5, np.float32(0), _power(gone, _POWER))
        codes, scale = _codes(values.T)
        sums = (weights @ codes.T).astype(np.float32) * scale[:, 0]
        out, total, most = _fused(out, keep, sums), _fused(total, keep, weights.sum(-1, keepdims=True)), above
    part = np.float32(1) / np.maximum(total, np.float32(2.0**-126))
    return out * part
