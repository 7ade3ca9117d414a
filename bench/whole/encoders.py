"""Encoders: MiniLM with its trained weights, and the shapes of ViT-B/16 and of Whisper-base's encoder with random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...demo import onnx_runtime
from ...demo.data import all_sentences
from ...demo.model import Encoder, empty, load
from .subject import Inputs, Subject

_ROWS = 32
# Of the sentences: those timed in a batch, those whose cosines are measured, those for calibration.
_TIMED, _HELD, _CALIBRATION = slice(0, 32), slice(256, 512), slice(768, 1024)
_SHORT = 12  # tokens of the sentence that is timed alone


@lru_cache
def _encoder() -> Encoder:
    return load()


def _batch() -> Inputs:
    return _encoder().tokenize(all_sentences()[_TIMED], _ROWS)[0]


def _alone() -> Inputs:
    return next(one for one in _encoder().tokenize(all_sentences(), 1) if one["input_ids"].shape[1] == _SHORT)


def pooled(output: Any, inputs: Inputs) -> Tensor:
    """The mean of the last hidden states over tokens that are not padding."""
    mask = inputs["attention_mask"][..., None]
    return (torch.as_tensor(output).float() * mask).sum(1) / mask.sum(1)


def _tokens(output: Any, _: Inputs) -> Tensor:
    return torch.as_tensor(output).float().flatten(0, 1)


MINILM = Subject(
    "MiniLM",
    lambda: load().model,
    {"batch 1": _alone, "batch 32": _batch},
    pooled,
    held=lambda: _encoder().tokenize(all_sentences()[_HELD], _ROWS),
    calibration=lambda: _encoder().tokenize(all_sentences()[_CALIBRATION], 1),
    empty=empty,
    fusion=onnx_runtime.FUSION,
    axes=onnx_runtime.AXES,
)


def _normal(name: str, *shape: int, seed: int = 0) -> dict[str, Tensor]:
    return {name: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return _seeded(lambda: ViTModel(ViTConfig(), add_pooling_layer=False))


def _images(rows: int, seed: int = 0) -> Mapping[str, Tensor]:
    return _normal("pixel_values", rows, 3, 224, 224, seed=seed)


VIT = Subject(
    "ViT-B/16",
    _vit,
    {"batch 1": lambda: _images(1), "batch 8": lambda: _images(8)},
    _tokens,
    calibration=lambda: [_images(1, seed) for seed in range(1, 33)],
    fusion={"model_type": "vit", "num_heads": 12, "hidden_size": 768},
    axes={"pixel_values": {0: "rows"}},
)


def _whisper() -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    shape: dict[str, Any] = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}
    return _seeded(lambda: WhisperEncoder(WhisperConfig(**shape)))


def _speech(seed: int = 0) -> Mapping[str, Tensor]:
    return _normal("input_features", 1, 80, 3000, seed=seed)


WHISPER = Subject(
    "Whisper-base encoder",
    _whisper,
    {"30 s": _speech},
    _tokens,
    calibration=lambda: [_speech(seed) for seed in range(1, 9)],
    fusion={"model_type": "bart", "num_heads": 8, "hidden_size": 512},
    axes={},
)
