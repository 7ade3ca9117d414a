"""Finished stages on disk, so that an interrupted run can resume."""

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
    """The layers of a finished stage, and its fields of the report."""

    layers: list[nn.Module]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Store:
    """A directory with a checkpoint for each finished stage.

    key: a hash of everything that the results depend on; part of the file names.
    """

    directory: Path
    key: str

    def save(self, name: str, layers: Sequence[nn.Module], facts: dict[str, Any]) -> None:
        """Write one stage atomically. Raises OSError."""
        from ...checkpoint.io import save

        save(_Held(layers, json.dumps(facts, sort_keys=True).encode()), self._path(name))

    def load(self, name: str, layers: Sequence[nn.Module]) -> Done | None:
        """The saved stage with layers like these, or None if it was not saved. Raises CheckpointError if it is damaged."""
        from ...checkpoint.files import INDEX
        from ...checkpoint.io import load

        path = self._path(name)
        if not (path / INDEX).exists():
            return None
        # Load into copies, so that the user's tensors are not overwritten.
        held = _Held([copy.deepcopy(layer) for layer in layers], b"")
        load(held, path)
        return Done(list(held.layers), json.loads(bytes(held.facts.tolist())))

    def _path(self, name: str) -> Path:
        return self.directory / f"{self.key[:16]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


class _Held(nn.Module):
    """Layers and report fields as one module, so that nybble.save can write them."""

    facts: Tensor

    def __init__(self, layers: Sequence[nn.Module], facts: bytes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        # A fixed size, since a checkpoint is loaded into tensors of the same shape.
        self.register_buffer("facts", torch.tensor(list(facts.ljust(_FACTS)), dtype=torch.uint8))


_FACTS = 512
