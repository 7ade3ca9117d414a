"""A file of torch.save: a zip archive with a program for its values (see plain_values) and the bytes of its tensors."""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .mapped import Entry, MappedFile, Span, check_spans
from .plain_values import STORAGES, Stored, plain_values

_LOCAL = 30  # bytes before the name in what the archive has before a file
_VALUES, _ORDER = "data.pkl", "byteorder"
# Bytes of the values, without those of tensors, which take up to 70 times as much in memory; and their share of a larger file.
_MOST, _SHARE = 1 << 20, 16


class TorchFile:
    """The values of a file and its tensors, in mapped memory. Nothing of the file is run.

    Attributes:
        values: what was saved; tensors are Stored.

    Raises CheckpointError where the file is damaged, or has anything but plain data.
    """

    def __init__(self, path: Path) -> None:
        self.file = MappedFile(path)
        self._places = _places(self.file)
        if _VALUES not in self._places:
            raise CheckpointError(f"{path}: {_VALUES}: is missing: not a file of torch.save")
        begin, end = self._places[_VALUES]
        most = max(_MOST, self.file.size // _SHARE)
        if end - begin > most:
            raise CheckpointError(
                f"{path}: {_VALUES}: {end - begin} bytes: at most {most} are read in a file of this size"
            )
        order = self._bytes(_ORDER).strip() if _ORDER in self._places else b"little"
        if order != b"little":
            raise CheckpointError(f"{path}: {_ORDER} {order[:16]!r}: must be little")
        self.values: Any = plain_values(self._bytes(_VALUES), f"{path}: {_VALUES}")

    def _bytes(self, name: str) -> bytes:
        return self.file.read(*self._places[name])

    def nbytes(self, stored: Stored) -> int:
        """The size of a tensor."""
        return math.prod(stored.shape) * _dtype(stored).itemsize

    def tensor(self, stored: Stored, name: str) -> Tensor:
        """A tensor. ``name``: for messages. Raises CheckpointError where the file does not have its numbers."""
        file, begin, end, dtype, shape = self.entry(stored, name)
        return file.tensor(begin, end, dtype, shape)

    def entry(self, stored: Stored, name: str) -> Entry:
        """Where the numbers of a tensor lie. As ``tensor`` else."""
        where, dtype = f"{self.file.path}: {name}", _dtype(stored)
        key = f"data/{stored.storage.key}"
        if key not in self._places:
            raise CheckpointError(f"{where}: its numbers, {key}, are missing")
        begin, end = self._places[key]
        if stored.storage.size * dtype.itemsize != end - begin:
            rule = f"{stored.storage.size} numbers of {dtype.itemsize} bytes"
            raise CheckpointError(f"{where}: {key} has {end - begin} bytes, must have {rule}")
        if len(stored.shape) > 8 or stored.strides != _strides(stored.shape):
            raise CheckpointError(f"{where}: strides {stored.strides} of {stored.shape}: must be row by row")
        first, count = stored.first, math.prod(stored.shape)
        if first + count > stored.storage.size:
            raise CheckpointError(
                f"{where}: numbers {first} to {first + count} of {stored.storage.size}: beyond the end"
            )
        begin += first * dtype.itemsize
        return Entry(self.file, begin, begin + count * dtype.itemsize, dtype, stored.shape)


def read_saved(path: Path) -> dict[str, Entry]:
    """The tensors of a file that has a dict of them, such as pytorch_model.bin."""
    file = TorchFile(path)
    if not isinstance(file.values, dict):
        raise CheckpointError(f"{path}: must be a dict of tensors")
    entries = {}
    for name, stored in file.values.items():
        if not isinstance(stored, Stored):
            raise CheckpointError(f"{path}: {name}: is a {type(stored).__name__}: must be a tensor")
        entries[name] = file.entry(stored, name)
    return entries


def _dtype(stored: Stored) -> torch.dtype:
    found: torch.dtype = getattr(torch, STORAGES[stored.storage.kind])
    return found


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _places(file: MappedFile) -> dict[str, tuple[int, int]]:
    """Where the bytes of each file of the archive lie, by its name without the folder that all are in."""
    path, found = file.path, {}
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError) as error:
        raise CheckpointError(f"{path}: not a file of torch.save, which is a zip archive: {error}") from error
    for one in listed:
        where = f"{path}: {one.filename[:200]}"
        if one.compress_type != zipfile.ZIP_STORED or one.file_size != one.compress_size or one.flag_bits & 1:
            raise CheckpointError(f"{where}: is compressed or encrypted; torch.save stores as it is")
        local = file.read(one.header_offset, one.header_offset + _LOCAL) if one.header_offset >= 0 else b""
        if len(local) != _LOCAL or local[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{where}: header_offset {one.header_offset}: no file begins there")
        name_size, extra = struct.unpack("<HH", local[26:30])
        begin = one.header_offset + _LOCAL + name_size + extra
        name = one.filename.partition("/")[2]
        if not name or name in found:
            raise CheckpointError(f"{where}: must be in one folder, and there once")
        found[name] = begin, begin + one.file_size
    spans = (Span(begin, end, name) for name, (begin, end) in found.items())
    check_spans(spans, path, 0, file.size)
    return found
