"""A mixture of experts in the shape of Qwen3-MoE: 0.5 B weights, 6 layers of 32 experts, of which 4 see a token."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..whole import lines
from ..whole.decoder import PREFILL, ids, ready
from ..whole.goals import Goal, everywhere
from ..whole.models import Model
from ..whole.nybble_models import by_scheme, contestant
from ..whole.subject import Subject
from ..whole.torch_models import BFLOAT16, REFERENCE

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
DECODE = "decode"
_PROMPT, _PREFILL, _STEPS = 16, 256, 8
# Random weights, and routers that choose other experts once what they read is rounded.
_LEAST = 0.5


def random_moe() -> nn.Module:
    """The model in float32 with random weights, always the same.

    Raises:
        ImportError: transformers is missing.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model: nn.Module = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE))
    return model.eval()


_WORDS = int(SHAPE["vocab_size"])
MOE = Subject(
    "Qwen3-MoE 0.5 B",
    random_moe,
    {PREFILL: partial(ids, _WORDS, 1, _PREFILL, 0), DECODE: partial(ids, _WORDS, 1, _PROMPT, _STEPS)},
    lambda logits, _: torch.as_tensor(logits).float(),
    ready=ready,
    arguments=lambda inputs: {"input_ids": inputs["prompt"]},
    steps={DECODE: _STEPS},
)
MODELS = (
    Model(
        MOE,
        (
            REFERENCE,
            replace(BFLOAT16, least_cosine=_LEAST),
            contestant("w4a8g128", by_scheme("w4a8g128"), torch.bfloat16, _LEAST),
        ),
        (lines.COSINE,),
    ),
)
_TORCH = (REFERENCE.name, BFLOAT16.name)
GOALS = (Goal(MOE.name, DECODE, everywhere(4), _TORCH), Goal(MOE.name, PREFILL, everywhere(2), _TORCH))
