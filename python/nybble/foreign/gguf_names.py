"""What llama.cpp and transformers call the same tensors, and the order of rows in which they differ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .gguf_config import ARCHITECTURES

ROPE = "rope_freqs.weight"  # of the whole model, and part of its configuration in transformers
_PERMUTED = ("llama",)  # whose rows of attn_q and attn_k are in the order of llama.cpp's rotary positions
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_HEADS = {"attn_q": "head_count", "attn_k": "head_count_kv"}


def tensor_name(architecture: str, name: str) -> str:
    """transformers' name of a tensor; the same name where the architecture or the tensor is not in the table."""
    stem, _, ending = name.rpartition(".")
    if architecture not in ARCHITECTURES or ending not in ("weight", "bias"):
        return name
    block = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)", stem)
    if block is not None and block[2] in _BLOCK:
        return f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{ending}"
    return f"{_MODEL[stem]}.{ending}" if stem in _MODEL else name


def expert_name(architecture: str, name: str, expert: int) -> str | None:
    """transformers' name of one expert's matrix of a tensor that has those of all; None: it is no such tensor."""
    found = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)\.weight", name)
    if architecture not in ARCHITECTURES or found is None or found[2] not in _EXPERTS:
        return None
    return f"model.layers.{found[1]}.mlp.experts.{expert}.{_EXPERTS[found[2]]}"


def row_order(fields: Mapping[str, Any], name: str, rows: int) -> Tensor | None:
    """The file's row of each of transformers' rows; None: they are the same."""
    architecture = fields.get("general.architecture")
    stem = name.rpartition(".")[0].rpartition(".")[2]
    if architecture not in _PERMUTED or stem not in _HEADS or not name.startswith("blk."):
        return None
    heads = fields.get(f"{architecture}.attention.head_count")
    key = f"{architecture}.attention.{_HEADS[stem]}"
    heads = fields.get(key, heads)
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"{key} {heads!r}: must divide the {rows} rows of {name} into heads of even size")
    return torch.arange(rows).reshape(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)
