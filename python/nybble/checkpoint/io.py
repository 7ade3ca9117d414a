"""Save a quantized model as safetensors plus a JSON index, and load it back into a model of the same structure."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from ..nn import Linear

# The other checkpoint_* modules are imported where they are used: `import nybble` has to stay quick.
from .files import CheckpointError, Digest, digest, read_index, replace_checkpoint

__all__ = ["CheckpointError", "load", "save"]


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the model's whole state into ``directory``: one safetensors file and ``nybble.json``.

    Quantized layers are written in the portable layout, so a checkpoint does not depend on the machine; a tensor that
    several names share is written once. The former checkpoint in the directory is replaced in one step: after an
    exception, a full disk or a kill, the old or the new one is there whole. One writer at a time.

    Raises:
        TypeError: the model is no module, or is itself a quantized layer.
        ValueError: the model holds something that safetensors cannot (a tensor on the meta device, an extra state that
            is no tensor). The directory is not touched.
        OSError: the files could not be written.
        ImportError: safetensors is not installed.
    """
    from .. import __version__
    from .index import Index, TensorEntry
    from .model import aliases_of, layer_entries, state_of
    from .tensors import require_safetensors, write_tensors

    require_safetensors()
    _check_model(model)
    layers = layer_entries(model)
    state = state_of(model)
    aliases = aliases_of(state, layers)
    stored = {name: tensor for name, tensor in state.items() if name not in aliases}
    spans: dict[str, tuple[int, int]] = {}

    def write_weights(path: Path) -> Digest:
        spans.update(write_tensors(stored, path))
        return digest(path, spans)

    def make_index(content: Digest) -> bytes:
        tensors = {name: TensorEntry(*span, content.crc32[name]) for name, span in spans.items()}
        index = Index(__version__, content.file_name, content.nbytes, content.sha256, layers, tensors, aliases)
        return index.to_json()

    replace_checkpoint(Path(directory), write_weights, make_index)


def load(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load what ``save`` wrote into ``model``, in place, and return it.

    Args:
        model: a module of the structure that was saved, on any device (the meta device included): the dense model
            before ``quantize``, or one that is quantized already in any scheme. Layers that the checkpoint has
            quantized are replaced; every other parameter and buffer is filled, and stays the same object unless it
            was on the meta device.
        directory: where the checkpoint lies.

    Raises:
        CheckpointError: (a ValueError) the checkpoint is missing, damaged, foreign or does not fit the model; the
            message names the field or tensor.
        TypeError: the model is no module, or is itself a quantized layer.
        ImportError: safetensors is not installed.

    After any exception the model is as it was.
    """
    from .index import parse_index
    from .model import Restore, index_limit
    from .tensors import check_content, open_tensors, require_safetensors

    require_safetensors()
    _check_model(model)
    directory = Path(directory)
    index = parse_index(read_index(directory, index_limit(model)))
    restore = Restore(model, index)
    path = directory / index.file
    check_content(path, index)
    # a caller in inference mode must not get tensors that autograd can never use
    with open_tensors(path, restore.stored_specs()) as read, torch.inference_mode(False), torch.no_grad():
        restore.fill(read)
        restore.apply()
    return model


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}: wants a torch.nn.Module")
    if isinstance(model, Linear):
        raise TypeError("model=Linear: is itself a quantized layer; put it into a module such as nn.Sequential first")
