"""An opened foreign checkpoint: its quantized layers and its other tensors, each read when it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..checkpoint.files import CheckpointError
from .mapped import MappedFile
from .source import Source
from .tensors import FLOAT8, Tensors
from .weight import ForeignWeight


@dataclass(frozen=True)
class Layer:
    """A quantized weight that has not been read yet. ``nbytes``: in the file."""

    read: Callable[[], ForeignWeight]
    nbytes: int


@dataclass(frozen=True)
class Part:
    """A tensor that is not quantized and has not been read yet."""

    read: Callable[[], Tensor]
    nbytes: int


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose headers were checked.

    ``config`` gives what config.json says, or what the file says in its place. ``files`` are those that it is read from.
    ``notes``: what it has besides that is not used.
    """

    layers: Mapping[str, Layer]
    parts: Mapping[str, Part]
    config: Callable[[], Mapping[str, Any]]
    files: tuple[MappedFile, ...] = ()
    notes: tuple[str, ...] = ()

    def release(self) -> None:
        """Give the memory of all that was read so far back to the system; tensors in mapped memory stay valid."""
        for file in self.files:
            file.release()


def renamed(opened: Opened, names: Mapping[str, str]) -> Opened:
    """The checkpoint with other names of layers; their biases follow.

    Raises:
        ValueError: ``names`` has a name that is no layer of the checkpoint, or makes two layers one.
    """
    if unknown := sorted(names.keys() - opened.layers.keys()):
        known = ", ".join(list(opened.layers)[:5])
        raise ValueError(f"names: {unknown[0]!r}: must be a layer of the checkpoint, such as {known}")
    layers = {names.get(name, name): layer for name, layer in opened.layers.items()}
    if len(layers) < len(opened.layers):
        raise ValueError(f"names={dict(names)!r}: must give each layer of the checkpoint a name of its own")
    biases = {f"{old}.bias": f"{new}.bias" for old, new in names.items()}
    parts = {biases.get(name, name): part for name, part in opened.parts.items()}
    return replace(opened, layers=layers, parts=parts)


def modules_of(
    names: Iterable[str], needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, dict[str, str]]:
    """Each module that has tensors with these endings -> ending -> tensor.

    Raises CheckpointError, naming the tensor, where one of those that are needed is missing.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        module, _, part = name.rpartition(".")
        if part in needed or part in optional:
            found.setdefault(module, {})[part] = name
    for module, parts in found.items():
        lost = [part for part in needed if part not in parts]
        if lost:
            raise CheckpointError(f"{module}.{lost[0]}: is missing, but there is {next(iter(parts.values()))}")
    return found


def opened(
    source: Source,
    tensors: Tensors,
    modules: Mapping[str, Mapping[str, str]],
    read: Callable[[str], ForeignWeight],
) -> Opened:
    """A checkpoint of safetensors files: its layers, and all tensors that belong to none of them."""
    theirs = {name for parts in modules.values() for name in parts.values()}
    layers = {
        name: Layer(functools.partial(read, name), tensors.nbytes(parts.values())) for name, parts in modules.items()
    }
    parts = {
        name: Part(functools.partial(tensors.read, name), tensors.nbytes([name]))
        for name in tensors.entries
        if name not in theirs
    }
    for name in parts:
        if tensors.entries[name].dtype in FLOAT8:  # there is a scale somewhere, by another name
            raise CheckpointError(
                f"{name}: is {tensors.entries[name].dtype}, of no layer that this format is known to have"
            )
        owner = next((owner for owner in _owners(name) if owner in modules), None)
        if owner is not None and name != f"{owner}.bias":
            raise CheckpointError(f"{name}: not a tensor that a quantized layer of this format has")
    files = {id(entry.file): entry.file for entry in tensors.entries.values()}
    return Opened(layers, parts, lambda: source.config, tuple(files.values()))


def _owners(name: str) -> Iterable[str]:
    """All modules that a tensor is in."""
    at = name.rfind(".")
    while at > 0:
        yield name[:at]
        at = name.rfind(".", 0, at)
