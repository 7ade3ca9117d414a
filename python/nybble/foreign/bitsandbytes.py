"""bitsandbytes: NF4 and FP4 codes in blocks over the flattened matrix, and int8 rows.

4 bits: the bytes of weight, two codes each, the high one first; quant_map: what codes stand for; absmax: a scale for each
block, float32, or uint8 places in nested_quant_map, times nested_absmax, plus an offset. The shape is in the JSON of
quant_state. int8: weight (N, K), SCB (N): weight = code * SCB * (1 / 127).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .bits import halves
from .opened import Opened, modules_of, opened
from .source import Source
from .tensors import Tensors, parse_json
from .weight import ForeignWeight, checked

_KINDS = ("nf4", "fp4")
_STATE = "quant_state.bitsandbytes__"
_NESTED = ("nested_absmax", "nested_quant_map")
_STORAGE = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_BYTE_ORDER = 0  # weight_format: rows as they are
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def detect(source: Source) -> bool:
    return source.method == "bitsandbytes"


def read_file(source: Source) -> Opened:
    tensors = Tensors(source.path)
    four = _four_bit(tensors)
    eight = modules_of(
        [n for n in tensors.entries if n.endswith((".SCB", ".weight_format"))], ("SCB",), ("weight_format",)
    )
    if not four and not eight:
        raise CheckpointError(f"{source.path}: says bitsandbytes, but has no tensor *.quant_state.* or *.SCB")
    for name, parts in eight.items():
        parts["weight"] = f"{name}.weight"

    def read(name: str) -> ForeignWeight:
        return _read4(name, tensors, four[name]) if name in four else _read8(name, tensors)

    result = opened(source, tensors, {**four, **eight}, read)
    for name in result.parts:
        if name.endswith(".weight") and not tensors.entries[name].dtype.is_floating_point:
            raise CheckpointError(f"{name}: is {tensors.entries[name].dtype}, but has neither a quant_state nor SCB")
    return result


def _four_bit(tensors: Tensors) -> dict[str, dict[str, str]]:
    """Module -> part -> tensor, of the layers of 4 bits."""
    known = {"absmax", "quant_map", *_NESTED, *(_STATE + kind for kind in _KINDS)}
    found: dict[str, dict[str, str]] = {}
    for name in tensors.entries:
        module, mark, part = name.partition(".weight.")
        if mark and part not in known:
            raise CheckpointError(f"{name}: not a tensor of a weight that is read")
        if mark:
            found.setdefault(module, {"weight": f"{module}.weight"})[part] = name
    for module, parts in found.items():
        states = [part for part in parts if part.startswith(_STATE)]
        if len(states) != 1:
            raise CheckpointError(f"{module}.weight.{_STATE}*: there are {len(states)}, must be one")
        for part in ("weight", "absmax", "quant_map"):
            if f"{module}.weight" not in tensors.entries or part not in parts:
                raise CheckpointError(f"{module}: the tensor of its {part} is missing")
    return found


def _read4(name: str, tensors: Tensors, parts: dict[str, str]) -> ForeignWeight:
    state_name = next(tensor for part, tensor in parts.items() if part.startswith(_STATE))
    stored = tensors.typed(state_name, (torch.uint8,), 1)
    state = parse_json(stored.numpy().tobytes(), state_name)
    if state.get("quant_type") != state_name.rpartition("__")[2]:
        raise CheckpointError(
            f"{state_name}: quant_type {state.get('quant_type')!r}: does not go with the tensor's name"
        )
    n, k = _shape(state, state_name)
    size = _positive(state, "blocksize", state_name)
    if size not in _BLOCKS:
        raise CheckpointError(f"{state_name}: blocksize {size}: must be one of {_BLOCKS}")
    weight = tensors.read(parts["weight"])
    if weight.dtype not in _STORAGE or weight.nbytes != -(-n * k // 2):
        rule = f"({n}, {k}) codes of 4 bits are {-(-n * k // 2)} bytes"
        raise CheckpointError(f"{parts['weight']}: {weight.nbytes} bytes of {weight.dtype}: {rule}")
    packed = weight.flatten().view(torch.uint8).numpy()
    codes = ((packed >> np.uint8(4)) | (packed << np.uint8(4))).reshape(1, -1)
    pairs = n * k % 2 == 0
    result = ForeignWeight(
        torch.from_numpy(codes if pairs else halves(codes)[:, : n * k]),
        4,
        _absmax(tensors, parts, state, state_name, -(-n * k // size)).reshape(1, -1),
        0,
        size,
        book=tensors.shaped(parts["quant_map"], (torch.float32,), (16,)),
        flat_shape=(n, k),
        per_byte=2 if pairs else 1,
    )
    whole = result.by_rows(n, k) if k % size == 0 else None  # no block crosses rows
    return checked(whole or result, name, "weight.absmax")


def _shape(state: dict[str, object], where: str) -> tuple[int, int]:
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise CheckpointError(f"{where}: shape {shape!r}: must be two numbers above 0")
    return shape[0], shape[1]


def _positive(state: dict[str, object], key: str, where: str) -> int:
    found = state.get(key)
    if type(found) is not int or found < 1:
        raise CheckpointError(f"{where}: {key} {found!r}: must be a number above 0")
    return found


def _absmax(tensors: Tensors, parts: dict[str, str], state: dict[str, object], where: str, blocks: int) -> Tensor:
    """The scale of each block, float32."""
    nested = [part for part in _NESTED if part in parts]
    if not nested:
        if "nested_blocksize" in state:
            raise CheckpointError(f"{where}: has nested_blocksize, but there is no {_NESTED[0]}")
        return tensors.shaped(parts["absmax"], (torch.float32,), (blocks,))
    if len(nested) != len(_NESTED):
        raise CheckpointError(f"{where}: {', '.join(_NESTED)}: one of the two is missing")
    places = tensors.shaped(parts["absmax"], (torch.uint8,), (blocks,))
    book = tensors.shaped(parts["nested_quant_map"], (torch.float32,), (256,))
    size = _positive(state, "nested_blocksize", where)
    outer = tensors.shaped(parts["nested_absmax"], (torch.float32,), (-(-blocks // size),))
    offset = state.get("nested_offset")
    if not isinstance(offset, float) or not math.isfinite(offset):
        raise CheckpointError(f"{where}: nested_offset {offset!r}: must be a finite number")
    scale: Tensor = book[places.int()] * outer[torch.arange(blocks) // size]
    return scale + torch.tensor(offset, dtype=torch.float32)


def _read8(name: str, tensors: Tensors) -> ForeignWeight:
    codes = tensors.typed(f"{name}.weight", (torch.int8,), 2)
    order = f"{name}.weight_format"
    if order in tensors.entries and tensors.shaped(order, (torch.uint8,), ()).item() != _BYTE_ORDER:
        raise CheckpointError(f"{order}: must be {_BYTE_ORDER} (rows); other orders are not read")
    scale = tensors.shaped(f"{name}.SCB", (torch.float32,), (codes.shape[0],))
    factor = float(np.float32(1) / np.float32(127))
    weight = ForeignWeight(codes, 8, scale.reshape(-1, 1), 0, codes.shape[1], factor=factor)
    return checked(weight, name, "SCB")
