"""What a writer of another library's format is: a row of the table in ``writers``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .held import Held


@dataclass(frozen=True)
class Encoded:
    """A layer in a format.

    tensors: by what follows the layer's name, without the bias.
    setting: what the configuration says of it; layers with equal settings are a group.
    how: in words.
    sqnr_db: of its weight to nybble's; ``inf``: equal, bit for bit.
    notes: what a user should know of the layer, such as what the format does not say of its activations.
    """

    tensors: Mapping[str, Tensor]
    setting: Mapping[str, Any]
    how: str
    sqnr_db: float = math.inf
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layers:
    """The linear layers of a checkpoint: ``settings`` of those that are quantized, and those that are ``dense``."""

    settings: Mapping[str, Mapping[str, Any]]
    dense: Sequence[str]

    def __contains__(self, name: str) -> bool:
        return name in self.settings or name in self.dense

    def groups(self) -> list[tuple[Mapping[str, Any], list[str]]]:
        """Each setting and its layers, the most frequent first."""
        found: list[tuple[Mapping[str, Any], list[str]]] = []
        for name, setting in self.settings.items():
            same = next((names for other, names in found if other == setting), None)
            if same is None:
                found.append((setting, [name]))
            else:
                same.append(name)
        return sorted(found, key=lambda group: -len(group[1]))


@dataclass(frozen=True)
class ForeignWriter:
    """A format that models are written in.

    ``what`` says for messages what it is. ``encode`` gives the tensors of a layer, whose scales it may round where its
    second argument says so; it raises NotHeldError, with the rule, for a layer that the format cannot hold. ``config`` is
    what config.json says under ``quantization_config``. ``notes`` are what a user should know of such a checkpoint.
    """

    name: str
    what: str
    encode: Callable[[Held, bool], Encoded]
    config: Callable[[Layers], dict[str, Any]]
    notes: Callable[[Layers], list[str]]


def in_words(layer: Held) -> str:
    """Bits, groups and zero points of a layer."""
    scheme = layer.scheme
    size = f" g{scheme.group_size}" if scheme.group_size else ""
    return f"{scheme.weight_bits} bits{size}{'' if scheme.symmetric else ' asym'}"
