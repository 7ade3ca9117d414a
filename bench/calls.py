"""What a text encoder costs beside its kernels: calls from Python into kernels, and Python's own time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..demo.breakdown import quiet_kineto
from ..fusion.fuse import fuse
from ..paired import Limits, Pairs, decide
from ..passes.quantize import quantize
from .figures import Figure

TOKENS, LAYERS = 12, 6
# As many layers and calls as MiniLM has, so narrow that kernels take next to no time.
NARROW: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 12,
    "intermediate_size": 96,
}
MOST_CALLS, MOST_SHARE = 12.0, 0.25


def call_figures(budget_s: float) -> Iterator[Figure]:
    """The calls of a layer into kernels, before and after fusing, and the share of Python's time that is left.

    The model has MiniLM's structure and random weights of w8a8; one sentence of 12 tokens. Calls are those that
    torch.profiler sees, without those inside others, and runs of compiled chains.

    Raises:
        ImportError: transformers is not installed.
    """
    before, batch = _encoder()
    after = deepcopy(before)
    fuse(after, [batch], goal="always")
    unfused, fused = (_calls(model, batch) for model in (before, after))
    yield Figure(
        f"MiniLM's layers, calls into kernels each ({unfused / LAYERS:.0f} unfused)", fused / LAYERS, "", MOST_CALLS
    )
    pairs = Pairs(partial(_run, before, batch), partial(_run, after, batch))
    speed = decide({1: pairs}, Limits(most=budget_s, patience=budget_s))[1]
    yield Figure("MiniLM's Python at one sentence, fused over unfused", 1 / speed.ratio, "x", MOST_SHARE)


def _encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertModel

    made: Any = BertModel(BertConfig(**NARROW, vocab_size=100))
    model: nn.Module = made.eval()
    quantize(model, "w8a8", goal="memory")
    ids = torch.randint(1, 100, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}


def _run(model: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        model(**batch)


def _calls(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Calls of torch's operations, of nybble's, and of chains, in one run."""
    _run(model, batch)
    with quiet_kineto(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        _run(model, batch)
    outer = [event for event in profiler.events() if event.cpu_parent is None]
    return len(outer) + _chains(model)


def _chains(model: nn.Module) -> int:
    from ..fusion.block import fused_modules

    kinds = [fused.first for fused in fused_modules(model).values()]
    return sum(lowered.calls for lowered in kinds if lowered is not None)
