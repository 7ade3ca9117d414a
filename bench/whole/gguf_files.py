"""A Llama of transformers as files of llama.cpp: written with the package gguf, quantized by llama.cpp itself."""

from __future__ import annotations

import ctypes
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Name of a kind in llama.cpp's files -> its code in llama_ftype.
KINDS = {"Q4_0": 2, "Q4_K_M": 15, "Q8_0": 7}

# Module of a layer of transformers -> its name in the file.
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OF_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}


def write(model: nn.Module, path: Path) -> None:
    """Writes a LlamaForCausalLM with tied embeddings, its matrices in bfloat16."""
    gguf: Any = import_module("gguf")
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in _tensors(model):
        kind = gguf.GGMLQuantizationType.F32 if tensor.dim() == 1 else gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Any) -> Any:
    state = model.state_dict()
    for module, name in _OF_MODEL.items():
        yield f"{name}.weight", state[f"{module}.weight"]
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for layer in range(model.config.num_hidden_layers):
        for module, name in _OF_LAYER.items():
            weight = state[f"model.layers.{layer}.{module}.weight"]
            count = heads.get(module.rpartition(".")[2])
            yield f"blk.{layer}.{name}.weight", weight if count is None else _neighbours(weight, count)


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head in llama.cpp's order: what rotary embedding turns together are neighbours, not halves."""
    halves: Tensor = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def quantize(source: Path, target: Path, kind: str) -> None:
    """Quantizes a file as llama.cpp's own tool does. Raises RuntimeError if it fails."""
    library: Any = import_module("llama_cpp")
    options = library.llama_model_quantize_default_params()
    options.ftype, options.nthread = KINDS[kind], torch.get_num_threads()
    code = library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
    if code:
        raise RuntimeError(f"llama_model_quantize failed with {code}")
