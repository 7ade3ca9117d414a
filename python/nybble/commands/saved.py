"""A directory that transformers' ``save_pretrained`` wrote of a model with nybble's layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.files import INDEX, CheckpointError
from ..checkpoint.index import LayerEntry
from ..foreign.empty import empty_model
from .model_dir import CONFIG, QUANTIZATION, load_class, read_config

_METHOD = "nybble"


def is_saved(directory: Path) -> bool:
    """Whether config.json says that the layers are nybble's."""
    return (
        (directory / CONFIG).is_file()
        and not (directory / INDEX).is_file()
        and _method(read_config(directory)) == _METHOD
    )


def _method(config: Mapping[str, Any]) -> object:
    told = config.get(QUANTIZATION[0])
    return told.get("quant_method") if isinstance(told, dict) else None


def plain_config(directory: Path) -> dict[str, Any]:
    """config.json without what it says of quantization."""
    return {key: value for key, value in read_config(directory).items() if key not in QUANTIZATION}


def load_saved(directory: Path) -> nn.Module:
    """The model, in eval mode. Raises CommandFailed as load_model, and CheckpointError for layers that are damaged."""
    return load_class(directory)


def saved_layers(directory: Path) -> tuple[LayerEntry, ...]:
    """The layers of such a directory, by its config.json; no weight is read.

    Raises:
        CheckpointError: it is damaged, or tells layers that the model does not have.
        ImportError: transformers, which knows the shapes of the model, is not installed.
    """
    config = read_config(directory)
    model: Any = empty_model(config)
    from ..hf.restoring import Restoring  # after transformers was found to be there
    from ..hf.work import tied

    stored = config[QUANTIZATION[0]].get("stored")
    if not isinstance(stored, dict):
        raise CheckpointError(f"{directory / CONFIG}: {QUANTIZATION[0]}.stored: must be an object")
    with tied(model):
        return tuple(Restoring(model, stored).entries.values())
