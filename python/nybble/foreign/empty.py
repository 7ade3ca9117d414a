"""The model of transformers that a configuration tells, without memory for its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ..checkpoint.files import CheckpointError
from ..checkpoint.skeleton import skeleton

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_QUANTIZATION = ("quantization_config", "compression_config")


def empty_model(config: Mapping[str, Any]) -> nn.Module:
    """The model, with parameters on the meta device. Code beside the checkpoint is ignored."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("nybble.load_pretrained needs transformers: pip install 'nybble[hf]'") from error
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    kind: Any = getattr(transformers, name, None) if name else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(f"config.json: architectures {names!r}: must name a model of transformers")
    plain = {key: value for key, value in config.items() if key not in _QUANTIZATION}
    try:
        with skeleton():
            made: Any = cast(Any, kind).config_class.from_dict(plain)
            model: nn.Module = kind(made)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"config.json: {name} cannot be made from it: {error}") from error
    return model


def dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a configuration tells."""
    told = config.get("dtype", config.get("torch_dtype", "float32"))
    if told not in tuple(_DTYPES):
        raise CheckpointError(f"config.json: dtype {told!r}: must be one of {', '.join(_DTYPES)}")
    return _DTYPES[told]
