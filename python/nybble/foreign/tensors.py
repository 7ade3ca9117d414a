"""The tensors of a safetensors checkpoint, in one file or several, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from ..checkpoint.strict_json import parse, short
from ..checkpoint.tensors import DTYPES
from .mapped import Entry, MappedFile, Span, check_spans
from .torch_file import read_saved

ONE_FILE = "model.safetensors"
SHARDS = "model.safetensors.index.json"
_OTHER = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # what training leaves beside a model
_MOST_HEADER = 100_000_000  # bytes, as safetensors allows
_MOST_JSON = 1 << 26
_LONGEST = 512  # characters of a name in a message
_DEEPEST = 32  # objects and lists inside each other
_KINDS = {
    **DTYPES,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else, and as ``strict_json.parse``."""
    value = parse(text, where, _DEEPEST)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: must be a JSON object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    file = MappedFile(path)
    if file.size > _MOST_JSON:
        raise CheckpointError(f"{path}: {file.size} bytes, at most {_MOST_JSON} are read")
    return parse_json(file.read(0, file.size), str(path))


def _entry(file: MappedFile, name: str, told: Any, data: int) -> Entry:
    where = f"{file.path}: {name[:_LONGEST]}"
    if not isinstance(told, dict):
        raise CheckpointError(f"{where}: must be an object")
    kind, shape, offsets = told.get("dtype"), told.get("shape"), told.get("data_offsets")
    dtype = _KINDS.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: dtype {short(kind)}: must be one of {', '.join(_KINDS)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_size(n) for n in shape):
        raise CheckpointError(f"{where}: shape {short(shape)}: must be a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_size(n) for n in offsets):
        raise CheckpointError(f"{where}: data_offsets {short(offsets)}: must be two numbers of bytes")
    begin, end = offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        rule = f"{shape} {kind} has {math.prod(shape) * dtype.itemsize} bytes"
        raise CheckpointError(f"{where}: data_offsets {offsets}: {rule}, not {end - begin}")
    return Entry(file, data + begin, data + end, dtype, tuple(shape))


def _size(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 48


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The tensors of one file, and its metadata."""
    file = MappedFile(path)
    length = int.from_bytes(file.read(0, 8), "little")
    if file.size < 8 or length > min(file.size - 8, _MOST_HEADER):
        raise CheckpointError(f"{path}: header: {length} bytes, in a file of {file.size}: truncated or not safetensors")
    told = parse_json(file.read(8, 8 + length), f"{path}: header")
    metadata = told.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header: __metadata__ must be an object of strings")
    entries = {name: _entry(file, name, value, 8 + length) for name, value in told.items()}
    spans = [Span(entry.begin, entry.end, name) for name, entry in entries.items()]
    check_spans(spans, path, 8 + length, file.size)
    return entries, metadata


class _Kind(NamedTuple):
    """A kind of files: how their names end, the name of a single one, and of the index of several (listing); and what reads one."""

    suffix: str
    single: str
    listing: str
    read: Callable[[Path], tuple[dict[str, Entry], dict[str, Any]]]


_SAFETENSORS = _Kind(".safetensors", ONE_FILE, SHARDS, read_header)
# Those of torch.save, which older libraries wrote: nothing of them is run, see plain_values.
_SAVED = _Kind(".bin", "pytorch_model.bin", "pytorch_model.bin.index.json", lambda path: (read_saved(path), {}))


def _files(directory: Path, kind: _Kind) -> list[Path]:
    """The files of a kind that have the usual names; empty if there is none."""
    if (directory / kind.listing).exists():
        shards = read_json(directory / kind.listing).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{directory / kind.listing}: weight_map: must be an object of file names")
        for name in shards.values():
            if Path(name).name != name or not name.endswith(kind.suffix):
                rule = f"{short(name)} is no {kind.suffix} file beside it"
                raise CheckpointError(f"{directory / kind.listing}: weight_map: {rule}")
        return [directory / name for name in sorted(set(shards.values()))]
    return [directory / kind.single] if (directory / kind.single).exists() else []


def _unnamed(directory: Path, kind: _Kind) -> list[Path]:
    """The only file of a kind, whatever its name."""
    found = sorted(path for path in directory.glob(f"*{kind.suffix}") if path.name not in _OTHER)
    if len(found) > 1:
        rule = f"has {len(found)} {kind.suffix} files, and neither {kind.single} nor {kind.listing}"
        raise CheckpointError(f"{directory}: {rule}")
    return found


def _checkpoint(directory: Path) -> tuple[_Kind, list[Path]]:
    """The files of the checkpoint in a directory: those that have the usual names go first."""
    for find in (_files, _unnamed):
        for kind in (_SAFETENSORS, _SAVED):
            if files := find(directory, kind):
                return kind, files
    raise CheckpointError(f"{directory}: has no safetensors file, nor one of torch.save (.bin)")


class Tensors:
    """All tensors of a checkpoint of safetensors, or, if there are none, of files of torch.save.

    Raises CheckpointError where a header does not fit its file.
    """

    def __init__(self, directory: Path) -> None:
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, Any] = {}
        self.directory = directory
        kind, files = _checkpoint(directory)
        for path in files:
            entries, metadata = kind.read(path)
            if twice := sorted(entries.keys() & self.entries.keys()):
                raise CheckpointError(f"{path}: {twice[0]}: is also in another file of the checkpoint")
            self.entries |= entries
            self.metadata |= metadata
        if (directory / kind.listing).exists():
            lost = sorted(read_json(directory / kind.listing)["weight_map"].keys() - self.entries.keys())
            if lost:
                raise CheckpointError(f"{directory / kind.listing}: weight_map: {lost[0]} is in none of the files")

    def nbytes(self, names: Collection[str]) -> int:
        """The bytes of some tensors in the files."""
        return sum(self.entries[name].end - self.entries[name].begin for name in names if name in self.entries)

    def read(self, name: str) -> Tensor:
        """A tensor, in mapped memory. Raises CheckpointError if there is none of this name."""
        if name not in self.entries:
            raise CheckpointError(f"{name}: is missing")
        file, begin, end, dtype, shape = self.entries[name]
        return file.tensor(begin, end, dtype, shape)

    def typed(self, name: str, dtypes: Collection[torch.dtype], dims: int) -> Tensor:
        """A tensor that has one of some dtypes, and a number of dimensions."""
        tensor = self.read(name)
        if tensor.dtype not in dtypes or tensor.dim() != dims:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            told = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            raise CheckpointError(f"{name}: is {told}, must be {allowed} with {dims} dimensions")
        return tensor

    def shaped(self, name: str, dtypes: Collection[torch.dtype], shape: tuple[int, ...]) -> Tensor:
        """A tensor that has one of some dtypes, and a shape."""
        tensor = self.typed(name, dtypes, len(shape))
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name}: is {tuple(tensor.shape)}, must be {shape}")
        return tensor


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
