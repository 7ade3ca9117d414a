"""GPTQ, v1, v2 and in planes: the files of gptqmodel, AutoGPTQ and auto-round.

qweight, int32 (K * bits / 32, N): each column is a stream of codes along K. qzeros, int32 (groups, N * bits / 32): each
row is a stream along N; the format gptq_p has planes in the place of streams. v1 stores the zero points less one, subtracted from whole words, with borrow. scales (groups, N).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .bits import as_bytes, unpack_planes, unpack_stream
from .gptq_dynamic import PLANES, Setting, format_of, settings
from .opened import Opened, modules_of, opened
from .source import Source
from .tensors import FLOATS, Tensors
from .weight import ForeignWeight, checked, ordered_groups

_NEEDED = ("qweight", "qzeros", "scales")
_AUTO_ROUND = ("auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round")


def detect(source: Source) -> bool:
    if source.method in ("auto-round", "intel/auto-round", "auto_round"):
        return source.quantization.get("packing_format") in _AUTO_ROUND
    return source.method == "gptq" or (not source.method and source.has("quantize_config.json"))


def read_file(source: Source) -> Opened:
    tensors = Tensors(source.path)
    modules = modules_of(tensors.entries, _NEEDED, ("g_idx",))
    if not modules:
        raise CheckpointError(f"{source.path}: says GPTQ, but has no tensor *.qweight")
    told = settings(source)
    bare = [name for name, parts in modules.items() if "g_idx" not in parts]
    if bare and source.quantization.get("desc_act") is True:
        raise CheckpointError(f"{bare[0]}.g_idx: is missing, though the configuration says desc_act")
    form = format_of(source)
    own = {name: told.of(name, tensors) for name in modules}
    return opened(source, tensors, modules, lambda name: _read(name, tensors, own[name], form))


def _read(name: str, tensors: Tensors, setting: Setting, form: str) -> ForeignWeight:
    bits, group_size, expected_zero = setting.bits, setting.group_size, setting.zero
    words = tensors.typed(f"{name}.qweight", (torch.int32,), 2)
    n = words.shape[1]
    unpack = unpack_planes if form == PLANES else unpack_stream
    if words.shape[0] * 32 % bits or (form == PLANES and words.shape[0] % bits):
        raise CheckpointError(f"{name}.qweight: {words.shape[0]} words hold no whole number of codes of {bits} bits")
    k = words.shape[0] * 32 // bits
    group_size = k if group_size == -1 else group_size
    groups = -(-k // group_size)
    scales = tensors.shaped(f"{name}.scales", FLOATS, (groups, n))
    rows = words.T.contiguous().view(torch.uint8)  # a byte of codes of 4 bits is one of nybble's
    codes = rows if bits == 4 else torch.from_numpy(unpack(rows.numpy(), bits, k))
    zero = _zeros(tensors, name, bits, (groups, n), form)
    if expected_zero is not None and (zero != expected_zero).any():
        where = f"are not all {expected_zero}, though the configuration says sym"
        raise CheckpointError(f"{name}.qzeros: {where}; is its checkpoint_format right?")
    index = f"{name}.g_idx"
    order = tensors.shaped(index, (torch.int32,), (k,)) if index in tensors.entries else None
    if order is None and k % group_size:
        raise CheckpointError(
            f"{name}.qweight: {k} inputs are no multiple of group_size {group_size}, and no g_idx is there"
        )
    weight = ForeignWeight(
        codes,
        bits,
        scales.T.contiguous(),
        zero.T.contiguous() if expected_zero is None else expected_zero,
        group_size,
        None if order is None else ordered_groups(order, name, group_size, groups),
        per_byte=2 if bits == 4 else 1,
    )
    return checked(weight, name, "scales")


def _zeros(tensors: Tensors, name: str, bits: int, shape: tuple[int, int], form: str) -> Tensor:
    """The zero points, int16 (groups, N)."""
    groups, n = shape
    words = tensors.shaped(f"{name}.qzeros", (torch.int32,), (groups, n * bits // 32)).numpy().view(np.uint32)
    if n * bits % 32 or (form == PLANES and n % 32):
        raise CheckpointError(f"{name}.qzeros: {n} zero points of {bits} bits do not fill whole words")
    v1 = form == "gptq"
    if v1 and 32 % bits == 0:
        ones = np.uint32(sum(1 << i for i in range(0, 32, bits)))
        words = words + ones  # modulo 2 ** 32: the borrow comes back
    zero = (unpack_planes if form == PLANES else unpack_stream)(as_bytes(words), bits, n)
    if v1 and 32 % bits:
        zero = (zero + np.uint8(1)) & np.uint8((1 << bits) - 1)
    return torch.from_numpy(zero.astype(np.int16))
