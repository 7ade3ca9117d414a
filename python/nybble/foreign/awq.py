"""AWQ: the files of AutoAWQ, llm-awq, gptqmodel and auto-round, in the layouts that their `version` names.

gemm: qweight, int32 (K, N / 8), and qzeros, int32 (groups, N / 8): nibble i of a word is column 8 * word + _ORDER[i]. scales
(groups, N). gemv: qweight (N, K / 8), qzeros (N, groups / 8), scales (N, groups), in order, and filled up with zeros.
gemv_fast: see awq_fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from ..compiled.codes import transpose_nibbles
from ..weights.weight_type import unpack_codes
from .awq_fast import read_fast
from .bits import as_bytes, halves
from .opened import Opened, modules_of, opened
from .source import Source
from .tensors import FLOATS, Tensors
from .weight import ForeignWeight, checked

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = tuple(_ORDER.index(column) for column in range(8))


def detect(source: Source) -> bool:
    if source.method in ("auto-round", "intel/auto-round", "auto_round"):
        return source.quantization.get("packing_format") == "auto_round:auto_awq"
    return source.method == "awq" or (not source.method and source.has("quant_config.json"))


def read_file(source: Source) -> Opened:
    told = source.quantization
    version = told.get("version") or "gemm"
    layout = _LAYOUTS.get(version.lower()) if isinstance(version, str) else None
    if layout is None:
        raise CheckpointError(f"{source.path}: version {version!r}: must be one of {', '.join(_LAYOUTS)}")
    tensors = Tensors(source.path)
    modules = modules_of(tensors.entries, layout.needed)
    if not modules:
        raise CheckpointError(f"{source.path}: says AWQ, but has no tensor *.qweight")
    source.number("w_bit" if "w_bit" in told else "bits", (4,))
    group_size = source.number("q_group_size" if "q_group_size" in told else "group_size", default=128)
    if group_size != -1 and group_size < 1:
        raise CheckpointError(f"{source.path}: group_size {group_size}: must be -1 (all inputs) or at least 1")
    return opened(source, tensors, modules, functools.partial(layout.read, tensors=tensors, group_size=group_size))


def _groups(name: str, k: int, group_size: int) -> tuple[int, int]:
    """The size of a group of K inputs, and how many there are."""
    size = k if group_size == -1 else group_size
    if k and k % size:
        raise CheckpointError(f"{name}.qweight: {k} inputs are no multiple of group_size {size}")
    return size, k // size if k else 0


def _read_gemm(name: str, tensors: Tensors, group_size: int) -> ForeignWeight:
    words = tensors.typed(f"{name}.qweight", (torch.int32,), 2)
    k, n = words.shape[0], words.shape[1] * 8
    size, groups = _groups(name, k, group_size)
    scales = tensors.shaped(f"{name}.scales", FLOATS, (groups, n))
    zeros = tensors.shaped(f"{name}.qzeros", (torch.int32,), (groups, n // 8))
    codes, per_byte = transpose_nibbles(words, _PLACES), 2
    if k % 2:
        codes, per_byte = unpack_codes(codes, 2, k), 1
    zero = unpack_codes(transpose_nibbles(zeros, _PLACES), 2, groups).to(torch.int16)
    weight = ForeignWeight(codes, 4, scales.T.contiguous(), zero, size, per_byte=per_byte)
    return checked(weight, name, "scales")


def _read_gemv(name: str, tensors: Tensors, group_size: int) -> ForeignWeight:
    words = tensors.typed(f"{name}.qweight", (torch.int32,), 2)
    n, k = words.shape[0], words.shape[1] * 8
    size, groups = _groups(name, k, group_size)
    packed = tensors.typed(f"{name}.qzeros", (torch.int32,), 2)
    if packed.shape[0] != n or packed.shape[1] * 8 < groups:
        raise CheckpointError(f"{name}.qzeros: is {tuple(packed.shape)}, must be ({n}, {-(-groups // 8)}) or wider")
    scales = tensors.shaped(f"{name}.scales", FLOATS, (n, packed.shape[1] * 8))
    zeros = torch.from_numpy(halves(as_bytes(packed.numpy().view(np.uint32))))
    _check_filling(name, scales[:, groups:], "scales")
    _check_filling(name, zeros[:, groups:], "qzeros")
    codes = words.contiguous().view(torch.uint8)
    weight = ForeignWeight(
        codes, 4, scales[:, :groups].contiguous(), zeros[:, :groups].to(torch.int16), size, per_byte=2
    )
    return checked(weight, name, "scales")


def _check_filling(name: str, beyond: Tensor, part: str) -> None:
    if beyond.any():
        raise CheckpointError(f"{name}.{part}: must be 0 beyond the last group; is group_size right?")


class _Layout(NamedTuple):
    """The tensors of a layer, and what reads them."""

    needed: tuple[str, ...]
    read: Callable[..., ForeignWeight]


_INTEGERS = ("qweight", "qzeros", "scales")
_LAYOUTS = {
    "gemm": _Layout(_INTEGERS, _read_gemm),
    "gemv": _Layout(_INTEGERS, _read_gemv),
    "gemv_fast": _Layout(_INTEGERS, functools.partial(read_fast, zeros="qzeros")),
    "llm-awq": _Layout(("qweight", "scaled_zeros", "scales"), functools.partial(read_fast, zeros="scaled_zeros")),
}
