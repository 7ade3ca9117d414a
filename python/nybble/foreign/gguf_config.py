"""The configuration of transformers that the fields of a GGUF file stand for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError

# llama.cpp's name of an architecture -> that of transformers' class, its model_type, and what is always so.
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "llama", {}),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", {}),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {"attention_bias": False}),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe", {"attention_bias": False, "norm_topk_prob": True}),
}
ARCHITECTURES = tuple(_KINDS)
# Fields, after the architecture's name -> key of the configuration.
_NEEDED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_OPTIONAL = {"feed_forward_length": "intermediate_size", "attention.head_count_kv": "num_key_value_heads"}
_HEAD = ("attention.key_length", "rope.dimension_count")
_TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
# What would change the result, and is not mapped: a file that has another value is refused.
_NOT_READ = {"attention.sliding_window": 0, "rope.scaling.type": "none", "attention.scale": 0.0, "logit_scale": 0.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class Fields:
    """The fields of one architecture."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.all, self.architecture = fields, str(fields.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        return self.all.get(f"{self.architecture}.{key}", default)

    def count(self, key: str) -> int:
        """A number above 0. Raises CheckpointError if there is none."""
        found = self.get(key)
        if not isinstance(found, int) or isinstance(found, bool) or not 0 < found < 1 << 31:
            raise CheckpointError(f"{self.architecture}.{key} {found!r}: must be a whole number above 0")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        found = self.get(key, default)
        if not isinstance(found, (int, float)) or isinstance(found, bool) or not 0 < found < math.inf:
            raise CheckpointError(f"{self.architecture}.{key} {found!r}: must be a number above 0")
        return float(found)


def config_of(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], kinds: Collection[str], rope: Tensor | None
) -> dict[str, Any]:
    """The configuration.

    Args:
        fields: of the file.
        shapes: of the tensors, by the file's names.
        kinds: the types of its matrices.
        rope: the tensor rope_freqs.weight, by which the frequencies of rotary positions are divided, or None.

    Raises:
        CheckpointError: the architecture is not known, a field is missing or wrong, or one has a value that is not read.
    """
    told = Fields(fields)
    if told.architecture not in _KINDS:
        known = ", ".join(_KINDS)
        raise CheckpointError(f"general.architecture {told.architecture!r}: as a model, only {known} are read")
    for key, usual in _NOT_READ.items():
        if told.get(key, usual) != usual:
            raise CheckpointError(f"{told.architecture}.{key} {told.get(key)!r}: must be {usual!r} or left out")
    if "token_embd.weight" not in shapes:
        raise CheckpointError("token_embd.weight: is missing")
    name, model_type, always = _KINDS[told.architecture]
    experts = _EXPERTS if told.architecture == "qwen3moe" else {}
    if not experts and told.get("expert_count", 0):
        raise CheckpointError(f"{told.architecture}.expert_count {told.get('expert_count')}: its experts are not read")
    optional = {key: new for key, new in _OPTIONAL.items() if told.get(key) is not None}
    config = {new: told.count(key) for key, new in (_NEEDED | experts | optional).items()}
    config |= {new: fields[key] for key, new in _TOKENS.items() if isinstance(fields.get(key), int)}
    head = next((told.count(key) for key in _HEAD if told.get(key) is not None), None)
    return {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": shapes["token_embd.weight"][0],
        "rms_norm_eps": told.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "dtype": next((new for kind, new in (("BF16", "bfloat16"), ("F16", "float16")) if kind in kinds), "float32"),
        **config,
        **({} if head is None else {"head_dim": head}),
        **_rope(told, rope, head or config["hidden_size"] // config["num_attention_heads"]),
        **({} if told.architecture != "llama" else _biases(shapes)),
        **always,
    }


def _biases(shapes: Collection[str]) -> dict[str, bool]:
    return {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_up.bias" in shapes}


def _rope(told: Fields, divisors: Tensor | None, head: int) -> dict[str, Any]:
    """Rotary positions. Divisors of frequencies must be those of Llama 3, which are then told as its few numbers."""
    base = told.number("rope.freq_base", 10000.0)
    if divisors is None:
        return {"rope_theta": base}
    factor = round(divisors.float().max().item(), 3)
    scaling = {**_LLAMA3, "factor": factor}
    expected = _llama3_divisors(base, head, scaling)
    if divisors.shape != expected.shape or not torch.allclose(divisors.float(), expected, rtol=1e-4):
        raise CheckpointError("rope_freqs.weight: is not the scaling of Llama 3, the only one that is read")
    return {"rope_theta": base, "rope_scaling": scaling}


def _llama3_divisors(base: float, head: int, scaling: Mapping[str, Any]) -> Tensor:
    """How much slower each rotary frequency turns: 1 for short waves, ``factor`` for long ones, between in between."""
    waves = 2 * math.pi * base ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    low, high, context = (
        scaling[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    share = ((context / waves - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / ((1 - share) / scaling["factor"] + share)
    return divisors.float()
