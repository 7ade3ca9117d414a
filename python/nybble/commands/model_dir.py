"""Load a transformers model from a directory of config.json and safetensors, without running code from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.files import CheckpointError
from ..demo.model import no_loading_bar
from ..foreign.tensors import read_json
from . import CommandFailed

CONFIG = "config.json"
QUANTIZATION = ("quantization_config", "compression_config")  # keys of config.json


def load_model(directory: Path) -> nn.Module:
    """Load the model in a directory, in its stored dtype and in eval mode.

    Its class is the transformers class that config.json names under "architectures"; code in the directory is ignored.

    Raises:
        CommandFailed: the directory has no such model, or transformers is not installed.
    """
    config = read_config(directory)
    if any(config.get(key) for key in QUANTIZATION):
        raise CommandFailed(f"{directory}: is quantized already; `nybble import` makes nybble's checkpoint of it")
    return load_class(directory)


def load_class(directory: Path) -> nn.Module:
    """As load_model, of a model that may be quantized."""
    try:
        import transformers
    except ImportError as error:
        raise CommandFailed("a model path needs transformers: pip install 'nybble[demo]'") from error
    name = _architecture(directory)
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CommandFailed(f"{directory / CONFIG}: transformers {transformers.__version__} has no model {name!r}")
    try:
        with no_loading_bar():
            model: nn.Module = kind.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, dtype="auto"
            )
    except (OSError, ValueError) as error:
        raise CommandFailed(f"{directory}: {_line(error)}") from error
    return model.eval()


def load_texts(directory: Path, texts: Sequence[str], tokens: int) -> list[dict[str, Any]]:
    """Tokenize each text as a batch of its own, of at most ``tokens`` tokens, with the tokenizer in the directory.

    Raises:
        CommandFailed: the directory has no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CommandFailed(f"--calibration needs a tokenizer in {directory}: {_line(error)}") from error
    batches = [dict(tokenizer(text, truncation=True, max_length=tokens, return_tensors="pt")) for text in texts]
    return [batch for batch in batches if batch["input_ids"].numel()]


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises CommandFailed if there is none."""
    path = directory / CONFIG
    try:
        return read_json(path)
    except CheckpointError as error:
        raise CommandFailed(f"{_line(error)}; must be beside the weights of a transformers model") from error


def _architecture(directory: Path) -> str:
    config = read_config(directory)
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CommandFailed(f"{directory / CONFIG}: has no 'architectures'")
    return names[0]


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
