"""A decoder: the Llama shape of ``bench/llama.py``.

Every contestant is given the same tokens, so that what it computes can be compared.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..llama import SHAPE, random_llama
from .subject import Call, Inputs, Subject

_PROMPT, _PREFILL, _STEPS = 16, 256, 8
# The least cosine with 4 bits, or with one scale for a weight: normal random weights then have errors of 9 to 12 %, and those
# of 16 layers add up. Measured: 0.68 to 0.76 with w4a8g128, 0.84 with llama.cpp's Q4_0, 0.85 with quantize_dynamic.
RANDOM_WEIGHTS = 0.6


def ids(words: int, rows: int, prompt: int, steps: int) -> Inputs:
    """Random tokens of a vocabulary: the prompts, and the steps after them."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(words, (rows, prompt + steps), generator=generator)
    return {"prompt": chosen[:, :prompt], "steps": chosen[:, prompt:]}


def forward(model: Any, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """The logits of the last position, and the cache."""
    out = model.model(tokens, past_key_values=cache, use_cache=True)
    return model.lm_head(out.last_hidden_state[:, -1]), out.past_key_values


def ready(model: nn.Module, inputs: Inputs) -> Call:
    """A prefill where there are no steps; else steps after a prompt whose cache is at hand."""
    prompt, steps = inputs["prompt"], inputs["steps"]

    @torch.inference_mode()
    def prefill() -> object:
        return forward(model, prompt)[0]

    if not steps.shape[1]:
        return prefill
    with torch.inference_mode():
        _, cache = forward(model, prompt)

    @torch.inference_mode()
    def decode() -> object:
        if more := cache.get_seq_length() - prompt.shape[1]:
            cache.crop(-more)
        for at in range(steps.shape[1]):
            logits, _ = forward(model, steps[:, at : at + 1], cache)
        return logits

    return decode


PREFILL, DECODE_1, DECODE_8 = "prefill 256", "decode batch 1", "decode batch 8"
_WORDS = int(SHAPE["vocab_size"])
LLAMA = Subject(
    "Llama 0.85 B",
    lambda: random_llama(torch.float32),
    {
        PREFILL: partial(ids, _WORDS, 1, _PREFILL, 0),
        DECODE_1: partial(ids, _WORDS, 1, _PROMPT, _STEPS),
        DECODE_8: partial(ids, _WORDS, 8, _PROMPT, _STEPS),
    },
    lambda logits, _: torch.as_tensor(logits).float(),
    ready=ready,
    arguments=lambda inputs: {"input_ids": inputs["prompt"]},
    steps={DECODE_1: _STEPS, DECODE_8: _STEPS},
)
