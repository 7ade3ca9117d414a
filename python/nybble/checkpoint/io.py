"""Save a model, quantized or not, and load it back into a model of the same structure."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from ..nn.module import QuantizedModule
from .formats import format_in, writer


def save(model: nn.Module, directory: str | os.PathLike[str], *, format: str = "nybble") -> None:
    """Write the model's whole state into ``directory``.

    The format ``"nybble"`` writes one safetensors file and ``nybble.json``. Quantized layers are written in the
    portable layout, which every machine can load. A tensor with several names is written once. The former checkpoint in
    the directory is replaced in a single step: after an exception, a full disk or a kill, the old or the new one is
    complete. Of two processes that save into one directory, the second waits for the first, and warns after 5 seconds.

    Args:
        model: a module; the quantized layers are inside it.
        directory: is made if it does not exist.
        format: a name from the table of formats, which plug-ins extend.

    Raises:
        TypeError: the model is no module, or is itself a quantized layer.
        ValueError: the format is unknown or can only be loaded, or the model holds something that safetensors cannot
            store (a tensor on the meta device, an extra state that is no tensor) or that ``load`` would refuse (scales that are
            not finite, names of more than 4096 characters). Nothing is written.
        RuntimeError: the thread is saving into the directory already, and was interrupted by the handler of a signal.
        OSError: the files could not be written.
        ImportError: safetensors is not installed.
    """
    _check_model(model)
    writer(format)(model, Path(directory))


def load(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint into ``model``, in place, and return the model. The format is the one that detects its files.

    Args:
        model: a module of the structure that was saved, on any device, also the meta device (the quickest is one made in
            ``nybble.skeleton``): the dense model before ``quantize``, or a model that is quantized in any scheme. Layers that the checkpoint has
            quantized are replaced. Every other parameter and buffer is filled, and stays the same object unless it
            was on the meta device.
        directory: of the checkpoint.

    Raises:
        CheckpointError: (a ValueError) the checkpoint is missing, damaged or does not fit the model, or no format or
            several formats detect it. The message names the field, the tensor or the formats.
        TypeError: the model is no module, or is itself a quantized layer.
        ImportError: safetensors is not installed.

    After any exception the model is as it was.
    """
    _check_model(model)
    directory = Path(directory)
    format_in(directory).load(model, directory)
    return model


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}: must be a torch.nn.Module")
    if isinstance(model, QuantizedModule):
        rule = "must be a module that contains the quantized layer, such as torch.nn.Sequential(layer)"
        raise TypeError(f"model={type(model).__name__}: {rule}")
