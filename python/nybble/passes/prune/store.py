"""Layers that are done, on disk, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...rounding import QuantizedWeight, check_portable, portable_spec
from .judge import Errors
from .weight import METHODS, Outcome, Task

_SCHEMA = "nybble.pruned/1"
_MOST_INDEX = 1 << 20


class Done(NamedTuple):
    """What a layer has become, and how far its output is from before."""

    outcome: Outcome
    errors: Errors


@dataclass(frozen=True)
class Store:
    """A directory with a checkpoint for each layer that is done.

    key: what the results depend on; those of another run are refused.
    """

    directory: Path
    key: str

    def save(self, name: str, done: Done) -> None:
        """Write one layer; a kill leaves it whole or absent. Raises OSError."""
        from ...checkpoint_files import Digest, digest, replace_checkpoint
        from ...checkpoint_tensors import write_tensors

        outcome, errors = done
        tensors = {"weight": outcome.weight, **(outcome.quantized.tensors() if outcome.quantized else {})}
        facts = {"method": outcome.method, "notes": list(outcome.notes), "errors": list(errors)}

        def write(path: Path) -> Digest:
            return digest(path, write_tensors(tensors, path))

        def index(content: Digest) -> bytes:
            held = {"file": content.file_name, "sha256": content.sha256, "coded": outcome.quantized is not None}
            return json.dumps({"schema": _SCHEMA, "key": self.key, **held, **facts}).encode()

        replace_checkpoint(self._path(name), write, index)

    def load(self, name: str, weight: Tensor, task: Task) -> Done | None:
        """A layer as it was saved, or None where it was not. Raises CheckpointError where it is not this run's."""
        from ...checkpoint_files import INDEX, WEIGHTS_NAME, CheckpointError, digest, read_index
        from ...checkpoint_tensors import open_tensors

        path = self._path(name)
        if not (path / INDEX).exists():
            return None
        index = _index(read_index(path, _MOST_INDEX))
        if index is None or not WEIGHTS_NAME.fullmatch(index["file"]):
            raise CheckpointError(f"resume={str(path)!r}: {INDEX} is not a pruned layer's")
        if index["key"] != self.key:
            raise CheckpointError(
                f"resume={str(self.directory)!r}: holds {name} of another model, calibration or setting; use a new "
                "directory"
            )
        file = path / index["file"]
        if digest(file, {}).sha256 != index["sha256"]:
            raise CheckpointError(f"resume={str(file)!r}: is damaged; remove {path}")
        specs = _specs(weight, task if index["coded"] else None)
        with open_tensors(file, specs) as read:
            tensors = {key: read(key) for key in specs}
        pruned = tensors.pop("weight")
        quantized = QuantizedWeight(**tensors) if index["coded"] else None
        if quantized is not None and task.scheme is not None:
            check_portable(quantized, task.scheme, *weight.shape)
        return Done(Outcome(pruned, index["method"], tuple(index["notes"]), quantized), Errors(*index["errors"]))

    def _path(self, name: str) -> Path:
        return self.directory / f"layer-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def open_store(directory: object, settings: Iterable[object], tensors: Iterable[Tensor]) -> Store:
    """The store of a run with these settings, weights and data. Raises TypeError, or ImportError without safetensors."""
    from ...checkpoint_tensors import require_safetensors

    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"resume={directory!r}: wants the path of a directory")
    require_safetensors()
    key = hashlib.sha256(repr([str(value) for value in settings]).encode())
    for tensor in tensors:
        key.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        key.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Store(Path(directory), key.hexdigest())


def _specs(weight: Tensor, task: Task | None) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    codes = {} if task is None or task.scheme is None else portable_spec(task.scheme, *weight.shape)
    return {"weight": (tuple(weight.shape), weight.dtype), **codes}


def _index(data: bytes) -> dict[str, Any] | None:
    """The index where every field is what it should be, else None."""
    try:
        index = json.loads(data)
    except ValueError:
        return None
    kinds = {"schema": str, "key": str, "file": str, "sha256": str, "coded": bool, "method": str}
    if not isinstance(index, dict) or any(type(index.get(field)) is not kind for field, kind in kinds.items()):
        return None
    notes, errors = index.get("notes"), index.get("errors")
    if not isinstance(notes, list) or not all(type(note) is str for note in notes):
        return None
    if not isinstance(errors, list) or not all(error is None or type(error) is float for error in errors):
        return None
    known = index["schema"] == _SCHEMA and index["method"] in METHODS and len(errors) == len(Errors._fields)
    return index if known else None
