"""optimum-quanto: qint8 and qfloat8 rows, and qint4 and qint2 codes with a float shift; the settings are in quanto_qmap.json.

qint8, qfloat8: weight._data, int8 or float8_e4m3fn (N, K), and weight._scale (N, 1). qint4: the weight is regrouped to (R, g),
R = N * K / g; weight._data._data, uint8 (R / 2, g), has row r of it in the low half and row r + R / 2 in the high half (qint2: rows
r + R / 4 and so on in the next two bits); weight = code * _scale - _shift, in the dtype of the scale. The file does not have N and
K.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ..checkpoint.files import CheckpointError
from .bits import pairs
from .float_codes import float8_codes
from .opened import Opened, opened
from .source import Source
from .tensors import FLOATS, Tensors, read_json
from .weight import ForeignWeight, checked

_MAP = "quanto_qmap.json"
_PACKED = ("weight._data._data", "weight._scale", "weight._shift")
_ROWS = ("weight._data", "weight._scale")
_FLOAT8 = "qfloat8_e4m3fn"
_PARTS = {"qint8": _ROWS, _FLOAT8: _ROWS, "qint4": _PACKED, "qint2": _PACKED}
_INPUTS = ("input_scale", "output_scale")


def detect(source: Source) -> bool:
    return source.has(_MAP)


def read_file(source: Source) -> Opened:
    told = read_json(source.path / _MAP)
    tensors = Tensors(source.path)
    modules: dict[str, dict[str, str]] = {}
    kinds: dict[str, str] = {}
    for name, setting in told.items():
        kind = setting.get("weights") if isinstance(setting, dict) else None
        if not isinstance(kind, str) or kind not in _PARTS:
            raise CheckpointError(f"{source.path / _MAP}: {name}: weights {kind!r}: must be one of {', '.join(_PARTS)}")
        if setting.get("activations") not in (None, "none"):
            raise CheckpointError(f"{source.path / _MAP}: {name}: quantized activations are not read yet")
        parts = {part: f"{name}.{part}" for part in _PARTS[kind]}
        if lost := [tensor for tensor in parts.values() if tensor not in tensors.entries]:
            raise CheckpointError(f"{lost[0]}: is missing, though {_MAP} says {kind}")
        modules[name] = parts | {part: f"{name}.{part}" for part in _INPUTS if f"{name}.{part}" in tensors.entries}
        kinds[name] = kind
    result = opened(source, tensors, modules, lambda name: _READ[kinds[name]](name, tensors))
    if left := [name for name in result.parts if ".weight._" in name]:
        raise CheckpointError(f"{left[0]}: belongs to no layer of {_MAP}")
    return result


def _read8(name: str, tensors: Tensors) -> ForeignWeight:
    codes = tensors.typed(f"{name}.weight._data", (torch.int8,), 2)
    scale = tensors.shaped(f"{name}.weight._scale", FLOATS, (codes.shape[0], 1))
    return checked(ForeignWeight(codes, 8, scale, 0, codes.shape[1]), name, "weight._scale")


def _read_float8(name: str, tensors: Tensors) -> ForeignWeight:
    part = f"{name}.weight._data"
    codes, book = float8_codes(tensors.typed(part, (torch.float8_e4m3fn,), 2), part)
    scale = tensors.shaped(f"{name}.weight._scale", FLOATS, (codes.shape[0], 1))
    weight = ForeignWeight(codes, 8, scale, 0, codes.shape[1], book=book, arithmetic=scale.dtype)
    return checked(weight, name, "weight._scale")


def _read_packed(name: str, tensors: Tensors, bits: int) -> ForeignWeight:
    packed = tensors.typed(f"{name}.weight._data._data", (torch.uint8,), 2)
    scale = tensors.typed(f"{name}.weight._scale", FLOATS, 2)
    rows, size, each = scale.shape[0], packed.shape[1], 8 // bits
    if scale.shape[1] != 1 or -(-rows // each) != packed.shape[0]:
        rule = f"{packed.shape[0]} rows of {each} codes a byte"
        raise CheckpointError(f"{name}.weight._scale: is {tuple(scale.shape)}, must be one of each group in {rule}")
    shift = tensors.shaped(f"{name}.weight._shift", (scale.dtype,), (rows, 1))
    if bits == 4 and rows % 2 == 0 and size % 2 == 0:  # two codes a byte are held as they are
        codes, per_byte = torch.from_numpy(pairs(packed.reshape(1, -1).numpy())), 2
    else:
        parts = [(packed >> bits * i) & ((1 << bits) - 1) for i in range(each)]
        codes, per_byte = torch.cat(parts)[:rows].reshape(1, -1), 1
    weight = ForeignWeight(
        codes,
        bits,
        scale.reshape(1, -1),
        0,
        max(size, 1),
        minimum=-shift.reshape(1, -1),
        arithmetic=scale.dtype,
        per_byte=per_byte,
    )
    return checked(weight, name, "weight._scale")


_READ: dict[str, Callable[[str, Tensors], ForeignWeight]] = {
    "qint8": _read8,
    _FLOAT8: _read_float8,
    "qint4": functools.partial(_read_packed, bits=4),
    "qint2": functools.partial(_read_packed, bits=2),
}
