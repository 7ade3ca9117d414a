"""Figures of attention: how much faster than torch's scaled_dot_product_attention, at the shapes of known models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attention import attention
from .figures import Figure
from .results import NAMES
from .timing import Runner, in_turns

LEAST, LEAST_INT8 = 1.5, 1.2
MOST_ERROR = 0.03  # of attention in 8 bits, relative to that in floats
DTYPES = (torch.float32, torch.bfloat16)


class Case(NamedTuple):
    """Sizes of an attention, and its mask: "", "causal", or padding as a mask (batch, 1, 1, keys) or (batch, 1, queries,
    keys) of bool ("padding", "bool") or floats ("float")."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    mask: str = ""


CASES = (
    *(Case(f"MiniLM b32 L={n}", 32, 12, 12, n, n, 32, mask) for n in (16, 128) for mask in ("", "padding", "bool")),
    Case("MiniLM b32 L=128", 32, 12, 12, 128, 128, 32, "float"),
    Case("MiniLM b1 L=12", 1, 12, 12, 12, 12, 32),
    *(Case(f"Llama D={d} prefill 256", 1, 32, 8, 256, 256, d, "causal") for d in (64, 128)),
    *(
        Case(f"Llama D={d} decode b{b} {n} keys", b, 32, 8, 1, n, d)
        for d in (64, 128)
        for b in (1, 8)
        for n in (256, 2048)
    ),
    Case("GPT 16 heads prefill 256", 1, 16, 16, 256, 256, 64, "causal"),
    Case("GPT 16 heads decode 512 keys", 1, 16, 16, 1, 512, 64),
    Case("ViT b1", 1, 12, 12, 197, 197, 64),
    Case("ViT b8", 8, 12, 12, 197, 197, 64),
    Case("Whisper-base encoder", 1, 8, 8, 1500, 1500, 64),
)


def attention_figures(budget_s: float) -> Iterator[Figure]:
    """Time of torch over time of nybble, each with the reshape to (batch, queries, heads * width) that follows.

    Raises:
        ValueError: the results differ.
    """
    with torch.inference_mode():
        for dtype in DTYPES:
            for case in CASES:
                ratio = _race(case, dtype, budget_s)
                name = f"attention {case.name} {case.mask or 'no mask'} {NAMES[dtype]}, torch over nybble"
                yield Figure(name, ratio, "x", LEAST, at_most=False, topic=f"attention {NAMES[dtype]}")


def int8_figures(budget_s: float) -> Iterator[Figure]:
    """Of attention with products of 8 bits, where it serves a case: time in floats over its time, and its error."""
    with torch.inference_mode():
        for case in CASES:
            q, k, v, how = _given(case, torch.float32)
            floats, int8 = partial(attention, q, k, v, **how), partial(attention, q, k, v, **how, int8=True)
            exact, rounded = floats(), int8()
            if torch.equal(exact, rounded):
                continue
            (slow, fast), _ = in_turns([Runner([floats]), Runner([int8])], budget_s)
            name, topic = f"attention {case.name} {case.mask or 'no mask'} int8", "attention int8"
            ratio, error = slow.median / fast.median, float((rounded - exact).norm() / exact.norm())
            yield Figure(f"{name}, float32 over it", ratio, "x", LEAST_INT8, at_most=False, topic=topic)
            yield Figure(f"{name}, relative error", error, "", MOST_ERROR, at_most=True, topic=topic)


def _given(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """q, k, v, and mask or causal."""

    def drawn(tokens: int, heads: int) -> Tensor:
        return torch.randn(case.batch, tokens, heads, case.width, dtype=dtype).transpose(1, 2)

    q, k, v = drawn(case.queries, case.heads), drawn(case.keys, case.kv_heads), drawn(case.keys, case.kv_heads)
    if case.queries == 1:  # a cache
        k, v = k.contiguous(), v.contiguous()
    return q, k, v, {"mask": _mask(case, dtype), "causal": case.mask == "causal"}


def _race(case: Case, dtype: torch.dtype, budget_s: float) -> float:
    q, k, v, how = _given(case, dtype)
    mask, causal, grouped = how["mask"], how["causal"], case.heads != case.kv_heads

    def theirs() -> Tensor:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)

    def ours() -> Tensor:
        return attention(q, k, v, mask, causal=causal).transpose(1, 2).flatten(2)

    torch.testing.assert_close(
        ours().float(), theirs().float(), rtol=0.0, atol=1e-5 if dtype == torch.float32 else 0.03
    )
    (mine, torchs), _ = in_turns([Runner([ours]), Runner([theirs])], budget_s)
    return torchs.median / mine.median


def _mask(case: Case, dtype: torch.dtype) -> Tensor | None:
    if case.mask in ("", "causal"):
        return None
    lengths = torch.linspace(case.keys / 2, case.keys, case.batch).long()
    mask = (torch.arange(case.keys) < lengths[:, None])[:, None, None, :].expand(-1, 1, case.queries, -1)
    if case.mask == "padding":
        return mask
    mask = mask.contiguous()
    return mask if case.mask == "bool" else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
