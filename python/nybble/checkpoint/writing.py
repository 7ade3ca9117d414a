"""Write a safetensors file piece by piece, so that one piece at a time is in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..model.allocator import return_freed
from .tensors import DTYPES, Spec

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_TRIM = 1 << 24  # bytes that are written until freed memory goes back to the system


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together. ``specs``: shape and dtype by name; ``make`` gives the tensors, on any device, and of
    any strides."""

    specs: Mapping[str, Spec]
    make: Callable[[], Mapping[str, Tensor]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Piece:
        """A tensor that is there already."""
        return cls({name: (tuple(tensor.shape), tensor.dtype)}, lambda: {name: tensor})


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, tuple[int, int]]:
    """``write_pieces`` of tensors that are in memory."""
    return write_pieces([Piece.of(name, tensor) for name, tensor in tensors.items()], path)


def write_pieces(pieces: Iterable[Piece], path: Path) -> dict[str, tuple[int, int]]:
    """Write a safetensors file and return each tensor's bytes in it, (begin, end), in ascending order.

    The header is written first, from the specs; then each piece is made, written and freed. Tensors with larger elements
    come first, so that each begins at a multiple of its element's size.

    Raises:
        ValueError: safetensors cannot store a tensor of some name.
        OSError: the file could not be written.
        RuntimeError: a piece made other tensors than its specs say.
    """
    pieces = list(pieces)
    specs = {name: spec for piece in pieces for name, spec in piece.specs.items()}
    header, spans = _laid_out(specs)
    with open(path, "wb", buffering=0) as file:
        _write_all(file.write, header)
        file.truncate(len(header) + sum(_nbytes(spec) for spec in specs.values()))
        since = 0
        for piece in pieces:
            made = piece.make()
            if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()} != dict(piece.specs):
                raise RuntimeError(f"{', '.join(piece.specs)}: the weight changed while the checkpoint was written")
            for name, tensor in made.items():
                file.seek(spans[name][0])
                _write_all(file.write, _bytes_of(tensor))
            since += sum(tensor.nbytes for tensor in made.values())
            del made
            if since >= _TRIM:
                return_freed()
                since = 0
    return spans


def _laid_out(specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header of a file, and where its tensors lie."""
    told: dict[str, object] = {_METADATA: {"format": "pt"}}
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for name, (shape, dtype) in sorted(specs.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        if name == _METADATA or _has_surrogate(name):
            raise ValueError(f"{name!a}: safetensors cannot store a tensor of this name")
        begin, end = end, end + _nbytes((shape, dtype))
        told[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        offsets[name] = begin, end
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: (data + b, data + e) for name, (b, e) in offsets.items()}


def _has_surrogate(name: str) -> bool:
    """Whether a name is no text: half of a pair of UTF-16, which UTF-8 cannot encode."""
    return any("\ud800" <= one <= "\udfff" for one in name)


def _nbytes(spec: Spec) -> int:
    return math.prod(spec[0]) * spec[1].itemsize


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_all(write: Callable[[memoryview], int | None], data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[write(left) or 0 :]
