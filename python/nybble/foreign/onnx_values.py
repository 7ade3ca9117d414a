"""The initializers of an ONNX graph: in the file itself, or, of large models, in files beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .mapped import MappedFile

_KEYS = ("location", "offset", "length", "checksum")


class Values:
    """``path``: of the file of the graph, in whose directory other files are."""

    def __init__(self, path: Path, initializers: Iterable[Any]) -> None:
        self._path = path
        self._values = {tensor.name: tensor for tensor in initializers}
        self._files: dict[str, MappedFile] = {}

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The other files: all are opened."""
        for name, value in self._values.items():
            if value.data_location or value.external_data:
                self._place(name, value)
        return tuple(self._files.values())

    def kind(self, name: str) -> int:
        """The number of a value's type; 0: there is no such value."""
        return int(self._values[name].data_type) if name in self._values else 0

    def nbytes(self, name: str) -> int:
        """The bytes of a value in its file; 0: there is no such value."""
        if name not in self._values:
            return 0
        value = self._values[name]
        if not (value.data_location or value.external_data):
            return len(value.raw_data)
        _, begin, end = self._place(name, value)
        return end - begin

    def array(self, name: str, kinds: Mapping[int, torch.dtype], shapes: tuple[tuple[int, ...], ...]) -> Tensor:
        """A value of one of some types, that has one of some shapes, in the first of them.

        Raises CheckpointError, naming it, for another, or one that is missing.
        """
        if name not in self._values:
            raise CheckpointError(f"{name}: is missing")
        value = self._values[name]
        if value.data_type not in kinds or tuple(value.dims) not in shapes:
            rule = " or ".join(map(str, shapes))
            raise CheckpointError(f"{name}: is {tuple(value.dims)} of type {value.data_type}, must be {rule}")
        dtype, outside = kinds[value.data_type], value.data_location or value.external_data
        needed, found = math.prod(shapes[0]) * dtype.itemsize, self.nbytes(name)
        if found != needed:
            raise CheckpointError(f"{name}: {'length' if outside else 'raw_data'}: {found} bytes, must be {needed}")
        if outside:
            file, begin, end = self._place(name, value)
            return file.tensor(begin, end, dtype, shapes[0])
        return torch.frombuffer(bytearray(value.raw_data), dtype=dtype).reshape(shapes[0])

    def _place(self, name: str, value: Any) -> tuple[MappedFile, int, int]:
        """The file that has a value, and where."""
        told = {entry.key: entry.value for entry in value.external_data}
        if unknown := [key for key in told if key not in _KEYS]:
            raise CheckpointError(f"{name}: external_data: {unknown[0]!r}: must be one of {', '.join(_KEYS)}")
        location = told.get("location", "")
        # A name of a file of this directory, whatever the system takes for a separator.
        if not isinstance(location, str) or set(location) & set("/\\\0") or location in ("", ".", ".."):
            raise CheckpointError(f"{name}: location {location!r}: must be the name of a file beside the graph")
        if location not in self._files:
            self._files[location] = MappedFile(self._path.parent / location)
        file = self._files[location]
        begin = _number(name, "offset", told.get("offset", "0"))
        size = _number(name, "length", told["length"]) if "length" in told else file.size - begin
        if size < 0 or begin + size > file.size:
            raise CheckpointError(f"{name}: offset {begin}, length {size}: beyond the {file.size} bytes of {location}")
        return file, begin, begin + size


def _number(name: str, key: str, text: object) -> int:
    if not isinstance(text, str) or not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise CheckpointError(f"{name}: {key} {text!r}: must be a number of bytes")
    return int(text)
