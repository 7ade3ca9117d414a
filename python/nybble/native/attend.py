"""Attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C
from .base import DTYPES, Memory, memory


class AttentionHow(NamedTuple):
    """scale: of the scores; causal, window: which keys a query sees, see csrc/attention.h.

    scales: of keys and of values that are int8 codes, each (B, KH, S), float32.

    int8: the name of a kernel whose products are of 8 bits; "": none.
    """

    scale: float
    causal: bool = False
    window: int = 0
    scales: tuple[Tensor, Tensor] | None = None
    int8: str = ""


_MASK_KINDS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}


def _placed(heads: Tensor) -> tuple[Memory, tuple[int, ...]]:
    return memory(heads), heads.stride()[:3]


def attention(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    how: AttentionHow,
) -> None:
    """out (B, H, L, Dv) = softmax(q k^T * scale + mask) v, with unit stride along the last dimension.

    All are of one dtype, but k and v are int8 with ``how.scales``: then a key is its codes times its scale.
    q: (B, H, L, D); k, v: (B, KH, S, D or Dv); mask: (B, H, L, S), bool or float; slopes: (H,) float32, contiguous.

    Raises:
        ValueError: a tensor is smaller than its shape says, or a size is out of range.
    """
    batch, heads, queries, width = q.shape
    _, kv_heads, keys, value_width = v.shape
    _C.attention(
        kernel,
        DTYPES[q.dtype],
        (batch, heads, kv_heads, queries, keys, width, value_width),
        (_placed(q), _placed(k), _placed(v), _placed(out)),
        None if mask is None else (memory(mask), _MASK_KINDS[mask.dtype], mask.stride()),
        memory(slopes),
        how.scale,
        how.causal,
        how.window,
        None if how.scales is None else (_placed(how.scales[0]), _placed(how.scales[1])),
        how.int8,
        torch.get_num_threads(),
    )
