"""GGUF, the files of llama.cpp. Layers have transformers' names and order of rows, where the architecture is known."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from ..weights.levels import Levels
from .gguf_config import config_of
from .gguf_header import GgufHeader, GgufTensor, read_header
from .gguf_names import ROPE, expert_name, row_order, tensor_name
from .gguf_types import Decoder
from .opened import Layer, Opened, Part
from .source import Source
from .weight import ForeignWeight, checked

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AT_ONCE = 1 << 18  # weights that are decoded at a time
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_EXPERTS = 1 << 12


def detect(source: Source) -> bool:
    return _first(source) is not None


def read_file(source: Source) -> Opened:
    path = _first(source)
    if path is None:
        raise CheckpointError(f"{source.path}: has no .gguf file")
    headers = _headers(path)
    architecture = headers[0].fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path}: general.architecture {architecture!r}: must be a name")
    layers: dict[str, Layer] = {}
    parts: dict[str, Part] = {}
    rope: Part | None = None
    tensors = {name: (header, tensor) for header in headers for name, tensor in header.tensors.items()}
    for name, (header, tensor) in tensors.items():
        nbytes, decode = tensor.end - tensor.begin, tensor.type.decode
        if name == ROPE:
            rope = Part(functools.partial(_floats, header, name, tensor), nbytes)
        elif decode is None and len(tensor.shape) < 3:
            parts[tensor_name(architecture, name)] = Part(functools.partial(_floats, header, name, tensor), nbytes)
        else:
            for new, one in _matrices(f"{path}: {name}", architecture, name, tensor):
                if decode is None:
                    parts[f"{new}.weight"] = Part(functools.partial(_floats, header, name, one), one.end - one.begin)
                else:
                    read = functools.partial(_weight, header, name, one, decode)
                    layers[new] = Layer(read, one.end - one.begin)
    shapes = {name: tensor.shape for name, (_, tensor) in tensors.items()}
    kinds = {tensor.type.name for _, tensor in tensors.values() if len(tensor.shape) > 1}

    def config() -> dict[str, object]:
        return config_of(headers[0].fields, shapes, kinds, None if rope is None else rope.read())

    return Opened(layers, parts, config, tuple(header.file for header in headers))


def _first(source: Source) -> Path | None:
    """The file, or the first of those that a model was split into."""
    if source.path.is_file():
        return source.single(".gguf")
    found = sorted(source.path.glob("*.gguf"))
    matches = [_SPLIT.fullmatch(path.name) for path in found]
    if len(found) > 1 and len({(match["stem"], match["count"]) if match else None for match in matches} - {None}) == 1:
        return found[0]
    return source.single(".gguf")


def _headers(path: Path) -> list[GgufHeader]:
    """The header of a file, or those of all files of a model, with the fields of the first."""
    first = read_header(path)
    count = first.fields.get("split.count", 0)
    if count in (0, 1):
        return [first]
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(f"{path}: split.count {count!r}: its name must end in -00001-of-{count:0>5}.gguf")
    paths = [path.with_name(f"{match['stem']}-{i:05}-of-{match['count']}.gguf") for i in range(1, count + 1)]
    headers = [first if one == path else read_header(one) for one in paths]
    names: set[str] = set()
    for i, (one, header) in enumerate(zip(paths, headers, strict=True)):
        found = header.fields.get("split.no"), header.fields.get("split.count")
        if found != (i, count):
            raise CheckpointError(f"{one}: split.no and split.count {found}: must be {(i, count)}")
        if twice := sorted(names & header.tensors.keys()):
            raise CheckpointError(f"{one}: {twice[0]}: is also in another file of the model")
        names |= header.tensors.keys()
    total = headers[0].fields.get("split.tensors.count", len(names))
    if total != len(names):
        raise CheckpointError(f"{path}: split.tensors.count {total!r}: the files have {len(names)} tensors")
    return [replace(header, fields=headers[0].fields) for header in headers]


def _matrices(where: str, architecture: str, name: str, tensor: GgufTensor) -> Iterator[tuple[str, GgufTensor]]:
    """A matrix by its new name; of a tensor of all experts, the matrix of each."""
    if len(tensor.shape) == 2:
        yield tensor_name(architecture, name).removesuffix(".weight"), tensor
        return
    count, *shape = tensor.shape
    if len(shape) != 2 or expert_name(architecture, name, 0) is None or count > _MOST_EXPERTS:
        raise CheckpointError(
            f"{where}: {tensor.shape} {tensor.type.name}: only matrices, and those of experts, are read"
        )
    step = (tensor.end - tensor.begin) // count
    for i in range(count):
        begin = tensor.begin + i * step
        new = expert_name(architecture, name, i)
        assert new is not None, "as of the first"  # noqa: S101
        yield new, GgufTensor(tuple(shape), tensor.type, begin, begin + step)


def _floats(header: GgufHeader, name: str, tensor: GgufTensor) -> Tensor:
    stored = header.file.tensor(tensor.begin, tensor.end, _FLOATS[tensor.type.name], tensor.shape)
    order = row_order(header.fields, name, tensor.shape[0])
    return stored if order is None else stored[order]


def _weight(header: GgufHeader, name: str, tensor: GgufTensor, decode: Decoder) -> ForeignWeight:
    n, k = tensor.shape
    raw = header.file.tensor(tensor.begin, tensor.end, torch.uint8, (-1, tensor.type.nbytes)).numpy()
    first = decode(raw[:1])
    codes = np.empty((len(raw), first.codes.shape[1]), first.codes.dtype)
    scale = np.empty((len(raw), first.scale.shape[1]), first.scale.dtype)
    minimum = None if first.minimum is None else np.empty((len(raw), first.minimum.shape[1]), first.minimum.dtype)
    levels = [np.empty((len(raw), part.shape[1]), part.dtype) for part in first.levels or ()]
    step = _AT_ONCE // tensor.type.values
    for at in range(0, len(raw), step):
        rows = slice(at, at + step)
        piece = decode(raw[rows])
        codes[rows], scale[rows] = piece.codes, piece.scale
        if minimum is not None:
            minimum[rows] = piece.minimum
        for whole, part in zip(levels, piece.levels or (), strict=True):
            whole[rows] = part
    weight = ForeignWeight(
        torch.from_numpy(codes).reshape(n, k // first.per_byte),
        first.bits,
        torch.from_numpy(scale).reshape(n, -1),
        first.zero,
        k // (math.prod(scale.shape) // n),
        minimum=None if minimum is None else torch.from_numpy(minimum).reshape(n, -1),
        book=None if first.book is None else torch.tensor(first.book, dtype=torch.float32),
        per_byte=first.per_byte,
        levels=Levels(*(torch.from_numpy(part).reshape(n, -1) for part in levels)) if levels else None,
    )
    order = row_order(header.fields, name, n)
    return checked(weight if order is None else weight.rows(order), name, "d", zero_scales=True)
