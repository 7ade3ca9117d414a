"""Tiny random models of transformers, one of each kind that the tests of transformers load and save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
_HEADS = {
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}
_T5 = {
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 96,
    "decoder_start_token_id": 0,
}
_WHISPER = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_mel_bins": 16,
    "vocab_size": 96,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "decoder_start_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "begin_suppress_tokens": None,
    "suppress_tokens": None,
}


def _tokens() -> Tensor:
    return torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))


def _text() -> dict[str, Tensor]:
    return {"input_ids": _tokens()}


def _pair() -> dict[str, Tensor]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens()[:, :3]}


def _sound() -> dict[str, Tensor]:
    features = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": _tokens()[:, :3]}


def _made(name: str, config: Any, **settings: object) -> Any:
    told = getattr(transformers, f"{config}Config")(**settings)
    return getattr(transformers, name)(told).eval()


# Name -> the model, and an input of it. Head and embedding share a weight in those that end in "-tied".
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]] = {
    "llama-tied": (lambda: _made("LlamaForCausalLM", "Llama", **_LLAMA, **_HEADS, tie_word_embeddings=True), _text),
    "llama": (lambda: _made("LlamaForCausalLM", "Llama", **_LLAMA, **_HEADS, tie_word_embeddings=False), _text),
    "qwen3": (lambda: _made("Qwen3ForCausalLM", "Qwen3", **_LLAMA, **_HEADS, head_dim=16), _text),
    "qwen3-tied": (
        lambda: _made("Qwen3ForCausalLM", "Qwen3", **_LLAMA, **_HEADS, head_dim=16, tie_word_embeddings=True),
        _text,
    ),
    "qwen3-moe": (lambda: _made("Qwen3MoeForCausalLM", "Qwen3Moe", **_LLAMA, **_HEADS, **_EXPERTS, head_dim=16), _text),
    "gpt2-tied": (lambda: _made("GPT2LMHeadModel", "GPT2", **_GPT2, bos_token_id=0, eos_token_id=1), _text),
    "gpt2": (lambda: _made("GPT2LMHeadModel", "GPT2", **_GPT2, tie_word_embeddings=False), _text),
    "bert-tied": (lambda: _made("BertForMaskedLM", "Bert", **_LLAMA), _text),
    "bert": (lambda: _made("BertForSequenceClassification", "Bert", **_LLAMA), _text),
    "t5-tied": (lambda: _made("T5ForConditionalGeneration", "T5", **_T5), _pair),
    "t5": (
        lambda: _made(
            "T5ForConditionalGeneration", "T5", **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False
        ),
        _pair,
    ),
    "whisper-tied": (lambda: _made("WhisperForConditionalGeneration", "Whisper", **_WHISPER), _sound),
}
