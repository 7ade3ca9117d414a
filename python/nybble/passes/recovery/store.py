"""Stages that are done, on disk, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Done(NamedTuple):
    """The layers of a stage, and what the report says of it."""

    layers: list[nn.Module]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Store:
    """A directory with a checkpoint for each stage that is done; key: what the results depend on, part of its name."""

    directory: Path
    key: str

    def save(self, name: str, layers: Sequence[nn.Module], facts: dict[str, Any]) -> None:
        """Write one stage; a kill leaves it whole or absent. Raises OSError."""
        from ...checkpoint.io import save

        save(_Held(layers, json.dumps(facts, sort_keys=True).encode()), self._path(name))

    def load(self, name: str, layers: Sequence[nn.Module]) -> Done | None:
        """A stage whose layers are these, as it was saved, or None. Raises CheckpointError where it is damaged."""
        from ...checkpoint.files import INDEX
        from ...checkpoint.io import load

        path = self._path(name)
        if not (path / INDEX).exists():
            return None
        # Copies: what the user's layers hold is not to be written into.
        held = _Held([copy.deepcopy(layer) for layer in layers], b"")
        load(held, path)
        return Done(list(held.layers), json.loads(bytes(held.facts.tolist())))

    def _path(self, name: str) -> Path:
        return self.directory / f"{self.key[:16]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


class _Held(nn.Module):
    """Layers and facts as a module that nybble.save takes."""

    facts: Tensor

    def __init__(self, layers: Sequence[nn.Module], facts: bytes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        # Of one size, since a checkpoint is loaded into what has its shapes.
        self.register_buffer("facts", torch.tensor(list(facts.ljust(_FACTS)), dtype=torch.uint8))


_FACTS = 512
