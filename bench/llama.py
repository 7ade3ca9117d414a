"""The models of ``--model``: a Llama with 0.79 B parameters and random weights, dense or quantized.

Speed does not depend on the values of the weights, so nothing is downloaded or trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}
_STEP = 9973
_NORMALS = 1 << 22  # random values, drawn once and repeated: drawing all weights takes longer than the measurement


def random_llama(dtype: torch.dtype, shape: dict[str, Any] = SHAPE) -> nn.Module:
    """LlamaForCausalLM in eval mode with weights from N(0, 0.02) and norm weights 1.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape)
    with torch.device("meta"):
        empty: Any = LlamaForCausalLM(config)
    model: Any = empty.to(dtype).to_empty(device="cpu")
    model.tie_weights()
    # Its frequencies are a non-persistent buffer, which to_empty has not initialized.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    normals = torch.empty(_NORMALS).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                normals = normals.roll(_STEP)  # no two weights are equal
                for piece in parameter.view(-1).split(_NORMALS):
                    piece.copy_(normals[: len(piece)])
    done: nn.Module = model.eval()
    return done


def _dynamic() -> nn.Module:
    model = random_llama(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the deprecation at every call
        convert: Any = import_module("torch.ao.quantization").quantize_dynamic
        quantized: nn.Module = convert(model, {nn.Linear}, torch.qint8, inplace=True)
    return quantized


def _nybble(scheme: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from ..passes.quantize import quantize

        model = random_llama(torch.bfloat16)
        quantize(model, scheme, goal="memory", untie=True)  # quantize the head too; the embedding keeps its own copy
        return model

    return build


BASELINE = "torch bf16"
CONTESTANTS: dict[str, Callable[[], nn.Module]] = {
    BASELINE: lambda: random_llama(torch.bfloat16),
    "torch quantize_dynamic": _dynamic,
    "nybble w8a8": _nybble("w8a8"),
    "nybble w4a8g128": _nybble("w4a8g128"),
    "nybble w4a16g128": _nybble("w4a16g128"),
}
