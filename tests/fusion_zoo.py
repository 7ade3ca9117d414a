"""Small models of many architectures, with random weights, for tests of `nybble.fuse`."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from nybble.report.fold import fold_names

_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}
_DECODER = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_VISION = {
    **{key: one for key, one in _SMALL.items() if key != "vocab_size"},
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
}


def ids(batch: int, length: int) -> torch.Tensor:
    """Token ids."""
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(batch * length))


def _padded(batch: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, -2:] = 0
    return {"input_ids": ids(batch, length), "attention_mask": mask}


def _clip() -> nn.Module:
    text = {**_SMALL, "max_position_embeddings": 32, "hidden_act": "quick_gelu", "projection_dim": 32}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    vision = {**_VISION, "projection_dim": 32}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def _whisper() -> nn.Module:
    sizes = {f"{side}_{key}": one for side in ("encoder", "decoder") for key, one in _WHISPER_SIDE.items()}
    ends = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.WhisperConfig(
        d_model=64, num_mel_bins=8, max_source_positions=20, max_target_positions=20, vocab_size=100, **sizes, **ends
    )
    return transformers.WhisperForConditionalGeneration(config)


_WHISPER_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}


def _t5() -> nn.Module:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def _deberta() -> nn.Module:
    position = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**_SMALL, **position, max_position_embeddings=32))


def _gpt2() -> nn.Module:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def _torch_encoder() -> nn.Module:
    return nn.Sequential(
        nn.TransformerEncoderLayer(64, 4, 128, batch_first=True),
        nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu", norm_first=True),
    )


def _images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


_TEXT: Any = {"input_ids": ids(2, 7)}
MAKERS: dict[str, tuple[Callable[[], nn.Module], list[Any], set[str]]] = {
    # How it is made, examples, and the modules that must run fused.
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**_SMALL)), [_padded(3, 9)], {"encoder"}),
    "bert with types": (
        lambda: transformers.BertModel(transformers.BertConfig(**_SMALL)),
        [{**_padded(3, 9), "token_type_ids": torch.zeros(3, 9, dtype=torch.int64)}],
        {""},
    ),
    "roberta": (lambda: transformers.RobertaModel(transformers.RobertaConfig(**_SMALL)), [_TEXT], {"encoder"}),
    "vit": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**_VISION)),
        [{"pixel_values": _images()}],
        {"layers.0", "layers.1"},
    ),
    "clip": (_clip, [{**_TEXT, "pixel_values": _images()}], {"text_model.encoder", "vision_model.encoder"}),
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER)),
        [_TEXT],
        {"model.layers.0", "model.layers.1"},
    ),
    "qwen3": (
        lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_DECODER, head_dim=16)),
        [_TEXT],
        {"model.layers.0", "model.layers.1"},
    ),
    "qwen3 moe": (
        lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**_DECODER, **_EXPERTS)),
        [{"input_ids": ids(2, 8)}],
        {"model.layers.0", "model.layers.1"},
    ),
    "mistral": (
        lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_DECODER, sliding_window=4)),
        [_TEXT],
        {"model.layers.0", "model.layers.1"},
    ),
    "gpt2": (_gpt2, [_TEXT], {"transformer.h.0", "transformer.h.1"}),
    "t5": (
        _t5,
        [{**_TEXT, "decoder_input_ids": ids(2, 5)}],
        {"encoder.block.1", "encoder.block.0.layer.1", "decoder.block.0.layer.2", "decoder.block.1.layer.2"},
    ),
    "whisper": (
        _whisper,
        [{"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids(2, 5)}],
        {"model.encoder.layers.0", "model.encoder.layers.1", "model.decoder.layers.0.self_attn"},
    ),
    "deberta": (_deberta, [_TEXT], {"encoder.layer.0.intermediate", "encoder.layer.1.output"}),
    "torch": (_torch_encoder, [(torch.randn(2, 7, 64),)], {""}),
}
LANGUAGE_MODELS = ("llama", "qwen3", "qwen3 moe", "mistral", "gpt2")


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in eval mode whose norms and biases are not those of a new one."""
    torch.manual_seed(0)
    model = MAKERS[name][0]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def run(model: nn.Module, example: Any) -> torch.Tensor:
    """The main output, without gradients."""
    with torch.no_grad():
        result = model(*example) if isinstance(example, tuple) else model(**example)
    names = ("logits", "last_hidden_state", "logits_per_image")
    found = result if isinstance(result, torch.Tensor) else next(result[name] for name in names if name in result)
    assert isinstance(found, torch.Tensor)
    return found


def described(report: Any) -> list[str]:
    """A report as rows of the table in docs/fusion.md: modules, steps, or why a module is left."""
    chains = fold_names(chain.name for chain in report.chains)
    steps = {chain.name: chain.steps for chain in report.chains}
    rows = [f"| | {_code(name)} | {steps[names[0]]} |" for name, names in chains.items()]
    reasons: dict[str, list[str]] = {}
    for left in report.left:
        if "tokens" not in left.reason and not left.reason.startswith("it returns"):
            reasons.setdefault(left.reason, []).append(left.name)
    return [*rows, *(f"| | {_code(*fold_names(names))} | left: {reason} |" for reason, names in reasons.items())]


def _code(*names: str) -> str:
    return ", ".join(f"`{name}`" if name else "the model" for name in names)
