"""Writes small checkpoints of GPTQ, for tests of memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file


def write(directory: Path, hidden: int, inner: int, blocks: int, tokens: int = 512) -> Path:
    """A Llama of 4 bits in groups of 128, with a dense embedding to which the head is tied. Returns the directory."""
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks, "vocab_size": tokens}
    told = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(told)
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            n, k = layer.weight.shape
            tensors[f"{name}.qweight"] = torch.randint(-(2**31), 2**31, (k // 8, n)).to(torch.int32)
            tensors[f"{name}.qzeros"] = torch.full((k // 128, n // 8), 0x77777777, dtype=torch.int32)
            tensors[f"{name}.scales"] = torch.full((k // 128, n), 2.0**-8, dtype=torch.float16)
        elif getattr(layer, "weight", None) is not None and name != "lm_head":
            tensors[f"{name}.weight"] = torch.ones(layer.weight.shape, dtype=torch.float16)
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    named = {"architectures": ["LlamaForCausalLM"], "dtype": "float16", "quantization_config": config}
    (directory / "config.json").write_text(json.dumps(told.to_dict() | named))
    return directory
