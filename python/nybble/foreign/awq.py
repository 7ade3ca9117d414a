"""AWQ, the gemm layout: the files of AutoAWQ, gptqmodel and auto-round.

qweight, int32 (K, N / 8), and qzeros, int32 (groups, N / 8): nibble i of a word is column 8 * word + _ORDER[i]. scales
(groups, N).
"""

from __future__ import annotations

import functools

import torch

from ..checkpoint.files import CheckpointError
from ..compiled.codes import transpose_nibbles
from ..weights.weight_type import unpack_codes
from .opened import Opened, modules_of, opened
from .source import Source
from .tensors import FLOATS, Tensors
from .weight import ForeignWeight, checked

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = tuple(_ORDER.index(column) for column in range(8))
_NEEDED = ("qweight", "qzeros", "scales")


def detect(source: Source) -> bool:
    if source.method in ("auto-round", "intel/auto-round", "auto_round"):
        return source.quantization.get("packing_format") == "auto_round:auto_awq"
    return source.method == "awq" or (not source.method and source.has("quant_config.json"))


def read_file(source: Source) -> Opened:
    tensors = Tensors(source.path)
    modules = modules_of(tensors.entries, _NEEDED)
    if not modules:
        raise CheckpointError(f"{source.path}: says AWQ, but has no tensor *.qweight")
    told = source.quantization
    source.number("w_bit" if "w_bit" in told else "bits", (4,))
    group_size = source.number("q_group_size" if "q_group_size" in told else "group_size", default=128)
    if group_size != -1 and group_size < 1:
        raise CheckpointError(f"{source.path}: group_size {group_size}: must be -1 (all inputs) or at least 1")
    version = told.get("version") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise CheckpointError(f"{source.path}: version {version!r}: must be 'gemm'; other layouts of AWQ are not read")
    return opened(source, tensors, modules, functools.partial(_read, tensors=tensors, group_size=group_size))


def _read(name: str, tensors: Tensors, group_size: int) -> ForeignWeight:
    words = tensors.typed(f"{name}.qweight", (torch.int32,), 2)
    k, n = words.shape[0], words.shape[1] * 8
    group_size = k if group_size == -1 else group_size
    if k and k % group_size:
        raise CheckpointError(f"{name}.qweight: {k} inputs are no multiple of group_size {group_size}")
    shape = (k // group_size, n)
    scales = tensors.shaped(f"{name}.scales", FLOATS, shape)
    zeros = tensors.shaped(f"{name}.qzeros", (torch.int32,), (shape[0], n // 8))
    codes, per_byte = transpose_nibbles(words, _PLACES), 2
    if k % 2:
        codes, per_byte = unpack_codes(codes, 2, k), 1
    zero = unpack_codes(transpose_nibbles(zeros, _PLACES), 2, shape[0]).to(torch.int16)
    weight = ForeignWeight(codes, 4, scales.T.contiguous(), zero, group_size, per_byte=per_byte)
    return checked(weight, name, "scales")
