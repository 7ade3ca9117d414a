"""GGUF, the files of llama.cpp. Layers have transformers' names and order of rows, where the architecture is known."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .gguf_header import GgufHeader, GgufTensor, read_header
from .gguf_names import row_order, tensor_name
from .gguf_types import Decoder
from .opened import Layer, Opened, Part
from .source import Source
from .weight import ForeignWeight, checked

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AT_ONCE = 1 << 15  # blocks that are decoded at a time


def detect(source: Source) -> bool:
    return source.single(".gguf") is not None


def read_file(source: Source) -> Opened:
    path = source.single(".gguf")
    if path is None:
        raise CheckpointError(f"{source.path}: has no .gguf file")
    header = read_header(path)
    if header.fields.get("split.count", 0) not in (0, 1):
        raise CheckpointError(f"{path}: split.count {header.fields['split.count']}: split files are not read yet")
    architecture = header.fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path}: general.architecture {architecture!r}: must be a name")
    layers: dict[str, Layer] = {}
    parts: dict[str, Part] = {}
    for name, tensor in header.tensors.items():
        new = tensor_name(architecture, name)
        nbytes = tensor.end - tensor.begin
        if tensor.type.decode is None:
            parts[new] = Part(functools.partial(_floats, header, name, tensor), nbytes)
        elif len(tensor.shape) != 2:
            raise CheckpointError(f"{path}: {name}: {tensor.shape} {tensor.type.name}: only matrices are read yet")
        else:
            read = functools.partial(_weight, header, name, tensor, tensor.type.decode)
            layers[new.removesuffix(".weight")] = Layer(read, nbytes)
    return Opened(layers, parts, header.fields, (header.file,))


def _floats(header: GgufHeader, name: str, tensor: GgufTensor) -> Tensor:
    stored = header.file.tensor(tensor.begin, tensor.end, _FLOATS[tensor.type.name], tensor.shape)
    order = row_order(header.fields, name, tensor.shape[0])
    return stored if order is None else stored[order]


def _weight(header: GgufHeader, name: str, tensor: GgufTensor, decode: Decoder) -> ForeignWeight:
    n, k = tensor.shape
    raw = header.file.tensor(tensor.begin, tensor.end, torch.uint8, (-1, tensor.type.nbytes)).numpy()
    pieces = [decode(raw[i : i + _AT_ONCE]) for i in range(0, len(raw), _AT_ONCE)]
    first = pieces[0]
    scale = torch.from_numpy(np.concatenate([piece.scale for piece in pieces])).reshape(n, -1)
    minimums = [piece.minimum for piece in pieces if piece.minimum is not None]
    weight = ForeignWeight(
        torch.from_numpy(np.concatenate([piece.codes for piece in pieces])).reshape(n, k),
        first.bits,
        scale,
        first.zero,
        k // scale.shape[1],
        minimum=torch.from_numpy(np.concatenate(minimums)).reshape(n, -1) if minimums else None,
        book=None if first.book is None else torch.tensor(first.book, dtype=torch.float32),
    )
    order = row_order(header.fields, name, n)
    return checked(weight if order is None else weight.rows(order), name, "d", zero_scales=True)
