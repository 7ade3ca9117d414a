"""Puts a foreign weight into a model, as nybble's module in the place of a dense one and of those that share its weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint.files import CheckpointError
from ..model.walk import Edits
from ..nn.embedding import Embedding
from ..nn.linear import Linear
from ..nn.module import QuantizedModule
from ..weights.activations import ActScale
from .choose import Chosen
from .weight import ForeignWeight

_PLACES = ("Linear", "Conv1D", "Embedding")


class Place(NamedTuple):
    """The dense modules of one weight (N, K); those that multiply with it are first."""

    names: tuple[str, ...]
    modules: tuple[Any, ...]
    shape: tuple[int, int]

    @property
    def multiplies(self) -> bool:
        """Whether one multiplies with the weight; else rows of it are read."""
        return not isinstance(self.modules[0], nn.Embedding)


def place_of(model: nn.Module, name: str, ties: Sequence[str]) -> Place:
    """The place of a weight. ``ties``: names of other modules with the same weight.

    Raises CheckpointError if there is no such module, or it is none that nybble replaces.
    """
    found = []
    for one in (name, *ties):
        try:
            module: Any = model.get_submodule(one)
        except AttributeError as error:
            raise CheckpointError(f"{one}: the model has no such module") from error
        matrix = getattr(module, "weight", None)
        if not isinstance(matrix, Tensor) or matrix.dim() != 2 or type(module).__name__ not in _PLACES:
            raise CheckpointError(f"{one}: is a {type(module).__name__}, must be one of {', '.join(_PLACES)}")
        found.append((one, module))
    found.sort(key=lambda pair: isinstance(pair[1], nn.Embedding))
    names, modules = zip(*found, strict=True)
    n, k = modules[0].weight.shape
    return Place(names, modules, (k, n) if type(modules[0]).__name__ == "Conv1D" else (n, k))


def shaped(weight: ForeignWeight, shape: tuple[int, int], name: str) -> ForeignWeight:
    """The weight, with the shape of the model where the file does not have it."""
    n, k = shape
    if weight.shape == (1, n * k) and n > 1 and (shaped := weight.by_rows(n, k)) is not None:
        return shaped
    if weight.shape != (n, k):
        raise CheckpointError(f"{name}: is {weight.shape} in the checkpoint, and {(n, k)} in the model")
    return weight


def put(
    model: nn.Module,
    place: Place,
    chosen: Chosen,
    bias: Tensor | None,
    dtype: torch.dtype,
    act: ActScale | None,
    edits: Edits,
) -> None:
    """Put modules with a weight into its place; they share it."""

    def swap(name: str, module: nn.Module) -> None:
        parent, _, key = name.rpartition(".")
        edits.put(model.get_submodule(parent)._modules, key, module)

    k, old = place.shape[1], place.modules[0]
    new: QuantizedModule
    if place.multiplies:
        new = Linear.from_quantized(chosen.quantized, k, bias, chosen.scheme, dtype, act)
    else:
        new = Embedding.from_quantized(chosen.quantized, k, None, chosen.scheme, dtype).adopt(old)
    swap(place.names[0], new)
    for name, module in zip(place.names[1:], place.modules[1:], strict=True):
        kind = Embedding if isinstance(module, nn.Embedding) else Linear
        scheme = chosen.scheme.without_activations if kind is Embedding else chosen.scheme
        twin = kind.on_meta(*place.shape, scheme, dtype)
        twin.tie_to(new)
        swap(name, twin.adopt(module))
