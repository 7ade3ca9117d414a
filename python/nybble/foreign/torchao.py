"""torchao: int8 codes, with a scale a row or groups, as safetensors hold its tensor subclasses.

The header's metadata has a JSON description of each weight; its tensors are _weight_qdata, int8 (N, K), _weight_scale
and _weight_zero_point.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .opened import Opened, modules_of, opened
from .source import Source
from .tensors import FLOATS, Tensors, parse_json
from .weight import ForeignWeight, checked

# The subclasses that are read -> the name of the field that says how many bits the codes have, or "": 8.
_KINDS = {"Int8Tensor": "", "IntxUnpackedToInt8Tensor": "target_dtype"}
_NEEDED = ("_weight_qdata", "_weight_scale")
_BITS = {f"int{bits}": bits for bits in range(1, 9)}


def detect(source: Source) -> bool:
    return source.method == "torchao"


def read_file(source: Source) -> Opened:
    tensors = Tensors(source.path)
    for name in tensors.entries:
        part = name.rpartition(".")[2]
        if part.startswith("_weight_") and part not in (*_NEEDED, "_weight_zero_point"):
            raise CheckpointError(f"{name}: not a tensor of a weight that is read")
    modules = modules_of(tensors.entries, _NEEDED, ("_weight_zero_point",))
    if not modules:
        raise CheckpointError(f"{source.path}: says torchao, but has no tensor *._weight_qdata that is read")
    return opened(source, tensors, modules, functools.partial(_read, tensors=tensors))


def _description(tensors: Tensors, name: str) -> dict[str, Any]:
    key = f"{name}.weight"
    if key not in tensors.metadata:
        raise CheckpointError(f"{key}: the header's metadata does not describe it")
    found = parse_json(tensors.metadata[key].encode(), f"{key}: metadata")
    if found.get("_type") not in tuple(_KINDS):
        raise CheckpointError(f"{key}: _type {found.get('_type')!r}: must be one of {', '.join(_KINDS)}")
    if not isinstance(found.get("_data"), dict):
        raise CheckpointError(f"{key}: _data: must be an object")
    return found


def _read(name: str, tensors: Tensors) -> ForeignWeight:
    told = _description(tensors, name)
    codes = tensors.typed(f"{name}._weight_qdata", (torch.int8,), 2)
    n, k = codes.shape
    block = told["_data"].get("block_size")
    if not isinstance(block, list) or [type(size) for size in block] != [int, int] or block[0] != 1 or block[1] < 1:
        raise CheckpointError(f"{name}.weight: block_size {block!r}: must be [1, inputs of a group]")
    if k % block[1]:
        raise CheckpointError(f"{name}.weight: block_size {block}: does not divide the {k} inputs")
    bits = _bits(told, name)
    for end in codes.aminmax() if codes.numel() else ():
        if not -(1 << (bits - 1)) <= int(end) < 1 << (bits - 1):
            raise CheckpointError(f"{name}._weight_qdata: code {int(end)}: must have {bits} bits")
    shape = (n, k // block[1])
    weight = ForeignWeight(
        codes,
        bits,
        _spread(tensors.read(f"{name}._weight_scale"), f"{name}._weight_scale", shape, FLOATS),
        _zero(tensors, f"{name}._weight_zero_point", shape),
        block[1],
    )
    return checked(weight, name, "_weight_scale")


def _bits(told: dict[str, Any], name: str) -> int:
    field = _KINDS[told["_type"]]
    if not field:
        return 8
    kind = told["_data"].get(field)
    found = kind.get("_data") if isinstance(kind, dict) else None
    if found not in tuple(_BITS):
        raise CheckpointError(f"{name}.weight: {field} {kind!r}: must be one of {', '.join(_BITS)}")
    return _BITS[found]


def _spread(tensor: Tensor, name: str, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """One number for each group: the file has them in one or two dimensions."""
    if tensor.dtype not in dtypes or tuple(tensor.shape) not in (shape, shape[:1] if shape[1] == 1 else shape):
        raise CheckpointError(f"{name}: is {tuple(tensor.shape)} {tensor.dtype}, must be {shape}")
    return tensor.reshape(shape)


def _zero(tensors: Tensors, name: str, shape: tuple[int, int]) -> Tensor | int:
    if name not in tensors.entries:
        return 0
    zero = _spread(tensors.read(name), name, shape, (torch.int8,))
    return zero.to(torch.int16) if zero.any() else 0
