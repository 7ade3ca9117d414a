"""Finished layers on disk, so that an interrupted run can resume."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...report.data import Tried
from ...weights import activations
from ...weights.rounding import check_portable, portable_spec
from ...weights.scheme import Scheme
from .errors import Errors
from .outcome import Outcome
from .tried import from_plain, to_plain

_SCHEMA = "nybble.layer/3"
_MOST_INDEX = 1 << 20
_DEEPEST = 8

Spec = tuple[tuple[int, ...], torch.dtype]


class Entry(NamedTuple):
    """What is stored for one name: tensors, a kind (the method), notes, numbers that may be missing, schemes tried."""

    tensors: Mapping[str, Tensor]
    kind: str
    notes: tuple[str, ...] = ()
    numbers: tuple[float | None, ...] = ()
    tried: tuple[Tried, ...] = ()


class Done(NamedTuple):
    """The outcome of a layer, its output errors, and the schemes that were tried."""

    outcome: Outcome
    errors: Errors
    tried: tuple[Tried, ...] = ()

    def entry(self) -> Entry:
        """The entry to store."""
        outcome = self.outcome
        return Entry(outcome.tensors(), outcome.method, outcome.notes, tuple(self.errors), self.tried)


@dataclass(frozen=True)
class Store:
    """A directory with a checkpoint for each entry.

    key: a hash of everything that the results depend on; entries with another key are refused.
    """

    directory: Path
    key: str

    def save(self, name: str, entry: Entry) -> None:
        """Write one entry atomically. Raises OSError."""
        from ...checkpoint.files import Digest, digest, replace_checkpoint
        from ...checkpoint.writing import write_tensors

        facts: dict[str, Any] = {"kind": entry.kind, "notes": list(entry.notes), "numbers": list(entry.numbers)}
        facts["tried"] = to_plain(entry.tried)

        def write(path: Path) -> Digest:
            return digest(path, write_tensors(dict(entry.tensors), path))

        def index(content: Digest) -> bytes:
            held = {"file": content.file_name, "sha256": content.sha256, "holds": sorted(entry.tensors)}
            told = {"schema": _SCHEMA, "key": self.key, **held, **facts}
            return json.dumps({**told, "check": _check_of(told)}).encode()

        replace_checkpoint(self._path(name), write, index)

    def load(self, name: str, specs: Mapping[str, Spec]) -> Entry | None:
        """The entry of a name, or None if it was not saved. ``specs``: shape and dtype of each tensor that it may hold.

        Raises CheckpointError if the entry is damaged or was written with another key.
        """
        from ...checkpoint.files import INDEX, WEIGHTS_NAME, CheckpointError, digest, read_index
        from ...checkpoint.tensors import open_tensors

        path = self._path(name)
        if not (path / INDEX).exists():
            return None
        index = _index(read_index(path, _MOST_INDEX))
        if index is None or not WEIGHTS_NAME.fullmatch(index["file"]):
            raise CheckpointError(f"resume={str(path)!r}: {INDEX} does not describe a layer")
        if index["key"] != self.key or not set(index["holds"]) <= specs.keys():
            raise CheckpointError(
                f"resume={str(self.directory)!r}: holds {name} from a run with another model, calibration data or "
                "settings; use a new directory"
            )
        file = path / index["file"]
        if digest(file, {}).sha256 != index["sha256"]:
            raise CheckpointError(f"resume={str(file)!r}: is damaged; remove {path}")
        held = {key: specs[key] for key in index["holds"]}
        with open_tensors(file, held) as read:
            tensors = {key: read(key) for key in held}
        return Entry(tensors, index["kind"], tuple(index["notes"]), tuple(index["numbers"]), index["tried"])

    def load_done(self, name: str, weight: Tensor, scheme: Scheme | None) -> Done | None:
        """The stored result of a layer with this weight (N, K) and dense scheme, or None if it was not saved."""
        codes = {} if scheme is None else portable_spec(scheme, *weight.shape)
        scales = activations.SPEC if scheme is not None and scheme.static else {}
        found = self.load(name, {"weight": (tuple(weight.shape), weight.dtype), **codes, **scales})
        if found is None:
            return None
        outcome = Outcome.of_tensors(found.tensors, found.kind, found.notes, scheme)
        if outcome.quantized is not None and scheme is not None:
            check_portable(outcome.quantized, scheme, *weight.shape)
        return Done(outcome, Errors(*found.numbers), found.tried)

    def _path(self, name: str) -> Path:
        return self.directory / f"layer-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def open_store(directory: object, settings: Iterable[object], data: Iterable[object]) -> Store:
    """The store of a run, keyed by its settings and by its data: tensors, for the most part.

    Raises TypeError, or ImportError without safetensors.
    """
    from ...checkpoint.tensors import require_safetensors

    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"resume={directory!r}: must be the path of a directory")
    require_safetensors()
    key = hashlib.sha256(repr([str(value) for value in settings]).encode())
    for tensor in data:
        if not isinstance(tensor, Tensor):
            key.update(repr(tensor).encode())
            continue
        key.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        key.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Store(Path(directory), key.hexdigest())


def _check_of(index: Mapping[str, Any]) -> str:
    """A hash of an index without its own, which finds damage."""
    told = {name: value for name, value in index.items() if name != "check"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _index(data: bytes) -> dict[str, Any] | None:
    """The parsed index, or None if a field is missing, has the wrong type, or was changed."""
    from ...checkpoint.files import CheckpointError
    from ...checkpoint.strict_json import parse

    try:
        index = parse(data, "resume", _DEEPEST)
    except CheckpointError:
        return None
    kinds = {"schema": str, "key": str, "file": str, "sha256": str, "kind": str}
    lists = {"holds": (str,), "notes": (str,), "numbers": (float, type(None))}
    if not isinstance(index, dict) or any(type(index.get(field)) is not kind for field, kind in kinds.items()):
        return None
    for field, allowed in lists.items():
        values = index.get(field)
        if not isinstance(values, list) or not all(type(value) in allowed for value in values):
            return None
    if index.get("check") != _check_of(index):
        return None
    index["tried"] = from_plain(index.get("tried"))
    return index if index["schema"] == _SCHEMA and index["tried"] is not None else None
