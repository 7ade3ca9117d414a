"""The header of a GGUF file: what it says of the model, and where its tensors lie. Little-endian, versions 2 and 3."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.files import CheckpointError
from .gguf_types import BlockType, block_type
from .mapped import MappedFile, Span, check_spans

# The formats of values, by the numbers that the file has for their types; strings and arrays are apart.
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_VALUES = {kind: struct.Struct(f"<{form}") for kind, form in _FORMS.items()}
_UINT32, _UINT64 = _VALUES[4], _VALUES[10]
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 24  # bytes of a string
_LEAST_TENSOR, _LEAST_FIELD = 24, 13  # bytes
_MOST = {"tensor_count": 1 << 20, "metadata_kv_count": 1 << 16}
_MOST_STRINGS = 1 << 24  # of an array


class GgufTensor(NamedTuple):
    """A tensor: shape, outermost dimension first, and its bytes in the file."""

    shape: tuple[int, ...]
    type: BlockType
    begin: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """Fields of one value each (those that are arrays are left out), and tensors by name."""

    file: MappedFile
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Reader:
    """Reads values one after the other. Raises CheckpointError where the file ends."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.at = file, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.file.size - self.at:
            raise CheckpointError(f"{self.file.path}: {what}: {count} bytes at {self.at}, past the end of the file")
        self.at += count
        return self.file.read(self.at - count, self.at)

    def skip(self, count: int, what: str) -> None:
        if count > self.file.size - self.at:
            raise CheckpointError(f"{self.file.path}: {what}: {count} bytes at {self.at}, past the end of the file")
        self.at += count

    def number(self, form: struct.Struct, what: str) -> Any:
        at = self.at
        self.skip(form.size, what)
        return self.file.unpack(form, at)

    def text(self, what: str) -> str:
        length = self.number(_UINT64, what)
        if length > _LONGEST:
            raise CheckpointError(f"{self.file.path}: {what}: a string of {length} bytes")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.file.path}: {what}: not UTF-8: {error}") from error

    def value(self, kind: int, what: str) -> Any:
        """A value, or None for an array, which is skipped."""
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self._skip_array(what)
        if kind not in _VALUES:
            raise CheckpointError(f"{self.file.path}: {what}: type {kind}: not a type of values")
        return self.number(_VALUES[kind], what)

    def _skip_array(self, what: str) -> None:
        kind, count = self.number(_UINT32, what), self.number(_UINT64, what)
        if kind == _STRING:
            if count > _MOST_STRINGS:
                raise CheckpointError(f"{self.file.path}: {what}: {count} strings: at most {_MOST_STRINGS} are read")
            if count > (self.file.size - self.at) // 8:
                raise CheckpointError(f"{self.file.path}: {what}: {count} strings, more than the file has")
            for _ in range(count):
                self.skip(self.number(_UINT64, what), what)
        elif kind in _VALUES:
            self.skip(count * _VALUES[kind].size, what)
        else:
            raise CheckpointError(f"{self.file.path}: {what}: an array of type {kind}: not read")


def read_header(path: Path) -> GgufHeader:
    """The header of a file. Raises CheckpointError, naming the field or the tensor, where it does not fit the file."""
    file = MappedFile(path)
    reader = _Reader(file)
    if reader.take(4, "magic") != b"GGUF":
        raise CheckpointError(f"{path}: magic: must be GGUF")
    version = reader.number(_UINT32, "version")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: version {version}: must be 2 or 3, little-endian")
    counts = {name: reader.number(_UINT64, name) for name in ("tensor_count", "metadata_kv_count")}
    for (name, count), least in zip(counts.items(), (_LEAST_TENSOR, _LEAST_FIELD), strict=True):
        if count > _MOST[name]:
            raise CheckpointError(f"{path}: {name} {count}: at most {_MOST[name]} are read")
        if count > file.size // least:
            raise CheckpointError(f"{path}: {name} {count}: more than a file of {file.size} bytes can have")
    fields = _fields(reader, counts["metadata_kv_count"])
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 16:
        raise CheckpointError(f"{path}: general.alignment {alignment!r}: must be a power of 2 up to 65536")
    told = _tensors(reader, counts["tensor_count"])
    data = -(-reader.at // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in told.items():
        if offset % alignment:
            raise CheckpointError(f"{path}: {name}: offset {offset}: must be a multiple of {alignment}")
        begin = data + offset
        tensors[name] = GgufTensor(shape, kind, begin, begin + math.prod(shape) // kind.values * kind.nbytes)
    spans = [Span(t.begin, t.end, name) for name, t in tensors.items()]
    check_spans(spans, path, data, max(file.size, data))
    _check_gaps(spans, path, data, file.size, alignment)
    return GgufHeader(file, fields, tensors)


def _check_gaps(spans: list[Span], path: Path, data: int, size: int, alignment: int) -> None:
    """Raises CheckpointError, naming the tensor, where bytes belong to none but fill up no tensor to the alignment, as after a
    shape that is told too small."""
    last = Span(data, data, "the header")
    for span in [*sorted(spans), Span(size, size, "the end of the file")]:
        if span.begin - last.end >= alignment:
            told = f"{span.begin - last.end} bytes between it and {span.name} belong to no tensor"
            raise CheckpointError(f"{path}: {last.name}: shape or offset: {told}")
        last = span


def _fields(reader: _Reader, count: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for i in range(count):
        key = reader.text(f"field {i}")
        if key in fields:
            raise CheckpointError(f"{reader.file.path}: {key}: is there twice")
        fields[key] = reader.value(reader.number(_UINT32, key), key)
    return {key: value for key, value in fields.items() if value is not None}


def _tensors(reader: _Reader, count: int) -> dict[str, tuple[tuple[int, ...], BlockType, int]]:
    path = reader.file.path
    tensors: dict[str, tuple[tuple[int, ...], BlockType, int]] = {}
    for i in range(count):
        name = reader.text(f"tensor {i}")
        if name in tensors:
            raise CheckpointError(f"{path}: {name}: is there twice")
        dims = reader.number(_UINT32, name)
        if not 1 <= dims <= 4:
            raise CheckpointError(f"{path}: {name}: {dims} dimensions: must be 1 to 4")
        shape = tuple(reader.number(_UINT64, name) for _ in range(dims))[::-1]
        if not all(1 <= size < 1 << 48 for size in shape):
            raise CheckpointError(f"{path}: {name}: shape {shape}: each size must be in [1, 2 ** 48)")
        kind = block_type(reader.number(_UINT32, name), f"{path}: {name}")
        if shape[-1] % kind.values:
            raise CheckpointError(f"{path}: {name}: {shape[-1]} columns are no multiple of {kind.name}'s {kind.values}")
        tensors[name] = shape, kind, reader.number(_UINT64, name)
    return tensors
