"""Checkpoints with random weights in the shape of a model of 0.8 billion, for figures of loading: GPTQ, and GGUF Q4_K_M."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


class Size(NamedTuple):
    """Of a Llama whose head is its embedding."""

    hidden: int = 2048
    inner: int = 5632
    blocks: int = 16
    tokens: int = 16384
    heads: int = 16


_GROUP = 128
# Of llama.cpp's blocks of 256 weights: the number of the type in GGUF, bytes, and where the float16 scales begin.
_KINDS = {"Q4_K": (12, 144, (0, 2)), "Q6_K": (14, 210, (208,))}
_Q4_K_M = 15
_PARTS = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
_TOKENIZER = _PARTS | {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
}


def _config(size: Size) -> dict[str, Any]:
    transformers: Any = import_module("transformers")
    told: dict[str, Any] = transformers.LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=size.tokens,
        tie_word_embeddings=True,
    ).to_dict()
    return told | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}


def _matrices(size: Size) -> Iterator[tuple[str, int, int]]:
    """The name of each linear layer in a block, with N and K."""
    wide, inner = size.hidden, size.inner
    yield from ((f"self_attn.{name}_proj", wide, wide) for name in "qkvo")
    yield from (("mlp.gate_proj", inner, wide), ("mlp.up_proj", inner, wide), ("mlp.down_proj", wide, inner))


def write_gptq(folder: Path, size: Size) -> Path:
    """A directory of 4 bits in groups of 128, symmetric, as gptqmodel writes it; the embedding is float16."""
    from safetensors.torch import save_file

    made = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for block in range(size.blocks):
        start = f"model.layers.{block}"
        for name, n, k in _matrices(size):
            words = torch.randint(-(2**31), 2**31, (k // 8, n), generator=made, dtype=torch.int64)
            tensors[f"{start}.{name}.qweight"] = words.to(torch.int32)
            tensors[f"{start}.{name}.qzeros"] = torch.full((k // _GROUP, n // 8), 0x77777777, dtype=torch.int32)
            scales = torch.rand(k // _GROUP, n, generator=made) * 2**-7 + 2**-9
            tensors[f"{start}.{name}.scales"] = scales.half()
            tensors[f"{start}.{name}.g_idx"] = (torch.arange(k) // _GROUP).int()
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{start}.{name}.weight"] = torch.ones(size.hidden, dtype=torch.float16)
    tensors["model.norm.weight"] = torch.ones(size.hidden, dtype=torch.float16)
    tensors["model.embed_tokens.weight"] = torch.randn(size.tokens, size.hidden, generator=made).half()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = {"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "sym": True, "desc_act": False}
    told |= {"checkpoint_format": "gptq", "lm_head": False, "pack_dtype": "int32"}
    (folder / "config.json").write_text(json.dumps(_config(size) | {"quantization_config": told}))
    (folder / "tokenizer.json").write_text(json.dumps(_TOKENIZER))  # gptqmodel loads no model without
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def write_gguf(folder: Path, size: Size) -> Path:
    """A file with the mixture of Q4_K and Q6_K that llama.cpp's Q4_K_M has. Needs the package gguf."""
    gguf: Any = import_module("gguf")
    folder.mkdir()
    path, blocks = folder / "model.gguf", size.blocks
    writer, made = gguf.GGUFWriter(str(path), "llama"), np.random.default_rng(0)
    writer.add_context_length(512)
    writer.add_embedding_length(size.hidden)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(size.inner)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(size.hidden // size.heads)
    writer.add_vocab_size(size.tokens)
    writer.add_file_type(_Q4_K_M)
    writer.add_tokenizer_model("llama")  # transformers wants one, of tokens that no text has
    writer.add_token_list([f"t{i}" for i in range(size.tokens)])
    writer.add_token_scores([0.0] * size.tokens)
    writer.add_token_types([1] * size.tokens)

    def matrix(name: str, n: int, k: int, kind: str) -> None:
        number, raw = _KINDS[kind][0], _random_blocks(made, n * k // 256, kind)
        writer.add_tensor(f"{name}.weight", raw.reshape(n, -1), raw_dtype=gguf.GGMLQuantizationType(number))

    matrix("token_embd", size.tokens, size.hidden, "Q6_K")
    ones = np.ones(size.hidden, np.float32)
    writer.add_tensor("output_norm.weight", ones)
    for block in range(blocks):
        more = block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
        for name, (_, n, k) in zip(_NAMES, _matrices(size), strict=True):
            matrix(f"blk.{block}.{name}", n, k, "Q6_K" if more and name in _FINER else "Q4_K")
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", ones)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return path


# What llama.cpp calls the matrices, in their order; of some blocks the second ones have 6 bits.
_NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_FINER = ("attn_v", "ffn_down")


def _random_blocks(made: np.random.Generator, count: int, kind: str) -> NDArray[np.uint8]:
    """Blocks of random codes and levels, whose scales are all one number."""
    _, nbytes, scales = _KINDS[kind]
    raw = made.integers(0, 256, (count, nbytes), dtype=np.uint8)
    for at in scales:
        raw[:, at : at + 2] = np.frombuffer(np.float16(2.0**-12).tobytes(), np.uint8)
    return raw


MAKERS: dict[str, Callable[[Path, Size], Path]] = {"gptq": write_gptq, "gguf-q4-k-m": write_gguf}
