"""compressed-tensors' layouts of dense weights.

Packed: weight_packed, int32 (N, W): each row is a stream of codes (from version 0.18.0 on, and always for 2, 4 and 8
bits), or has 32 // bits codes a word. weight_zero_point is packed in the same way along N. Codes and zero points are
unsigned in the file, 2 ** (bits - 1) above those that the library computes with. Plain: weight, int8 (N, K).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .bits import Bytes, as_bytes, unpack_stream, unpack_words
from .compressed_setting import Context, Setting
from .tensors import FLOATS, Tensors
from .weight import ForeignWeight, checked, ordered_groups


def scales_of(tensors: Tensors, name: str) -> Tensor:
    """The scales of a weight, in whatever shape."""
    scale = tensors.read(f"{name}.weight_scale")
    if scale.dtype not in FLOATS:
        raise CheckpointError(f"{name}.weight_scale: is {scale.dtype}, must be a float")
    return scale


def words_of(count: int, bits: int, dense: bool) -> int:
    """How many words hold a row of codes."""
    return -(-count * bits // 32) if dense else -(-count // (32 // bits))


def packed(name: str, context: Context) -> ForeignWeight:
    """A weight of the format pack-quantized."""
    tensors = context.tensors
    words = tensors.typed(f"{name}.weight_packed", (torch.int32,), 2)
    n, k = shape_of(tensors, f"{name}.weight_shape")
    scale = scales_of(tensors, name)

    def fits(setting: Setting) -> bool:
        widths = {words_of(k, setting.bits, dense) for dense in (True, False)}
        return words.shape[0] == n and words.shape[1] in widths and setting.fits(scale, n, k) and not setting.floats

    setting = context.setting(name, fits)
    dense = _is_dense(f"{name}.weight_packed", words.shape[1], k, setting.bits, context.dense_words)
    zero: Tensor | int = 1 << (setting.bits - 1)
    if f"{name}.weight_zero_point" in tensors.entries:
        stored = _packed_zeros(tensors, f"{name}.weight_zero_point", setting, tuple(scale.shape), dense)
        zero = setting.spread(stored, n, k)
    pairs = setting.bits == 4 and k % 2 == 0
    if pairs:  # as nybble has them
        codes = words.contiguous().view(torch.uint8)[:, : k // 2].contiguous()
    else:
        codes = torch.from_numpy(_unpack(words, setting.bits, k, dense))
    weight = ForeignWeight(
        codes,
        setting.bits,
        setting.spread(scale, n, k),
        zero,
        setting.group_size or k,
        _order(tensors, name, setting, k),
        per_byte=2 if pairs else 1,
    )
    return checked(_with_static_inputs(weight, tensors, name), name, "weight_scale")


def shape_of(tensors: Tensors, name: str) -> tuple[int, int]:
    """(N, K), as a tensor of two numbers, a row or a column, tells it."""
    stored = tensors.read(name)
    if stored.dtype not in (torch.int64, torch.int32) or stored.numel() != 2:
        raise CheckpointError(f"{name}: is {tuple(stored.shape)} {stored.dtype}, must be two int64")
    told = stored.flatten().tolist()
    if min(told) < 1:
        raise CheckpointError(f"{name}: {told}: both must be at least 1")
    return told[0], told[1]


def _is_dense(name: str, width: int, k: int, bits: int, told: bool | None) -> bool:
    """Whether rows are streams: by their number of words, and where that is that of both ways, by the version."""
    dense, sparse = words_of(k, bits, True), words_of(k, bits, False)
    if dense != sparse:
        return width == dense
    if 32 % bits and told is None and k > 32 // bits:
        rule = f"{bits} bits: {width} words hold {k} codes in the ways of old and new versions, and no version is told"
        raise CheckpointError(f"{name}: {rule}")
    return told is not False


def _unpack(words: Tensor, bits: int, count: int, dense: bool) -> Bytes:
    unsigned = words.numpy().view(np.uint32)
    return unpack_stream(as_bytes(unsigned), bits, count) if dense else unpack_words(unsigned, bits, count)


def _packed_zeros(tensors: Tensors, name: str, setting: Setting, shape: tuple[int, ...], dense: bool) -> Tensor:
    if tensors.entries[name].dtype == torch.int8:  # early versions did not pack them, and no version packs a single one
        return _signed(tensors.shaped(name, (torch.int8,), shape), name, setting.bits) + (1 << (setting.bits - 1))
    if len(shape) != 2:
        raise CheckpointError(f"{name}: is {tensors.entries[name].dtype}: one for all weights must be int8")
    n, groups = shape
    words = tensors.shaped(name, (torch.int32,), (words_of(n, setting.bits, dense), groups))
    zero = _unpack(words.T.contiguous(), setting.bits, n, dense).T
    return torch.from_numpy(np.ascontiguousarray(zero).astype(np.int16))


def _signed(codes: Tensor, name: str, bits: int) -> Tensor:
    """Signed codes as int16, after they were found to have so many bits."""
    low, high = (int(end) for end in codes.aminmax()) if codes.numel() else (0, 0)
    if low < -(1 << (bits - 1)) or high >= 1 << (bits - 1):
        raise CheckpointError(f"{name}: {low} to {high}: must be numbers of {bits} bits")
    return codes.to(torch.int16)


def _order(tensors: Tensors, name: str, setting: Setting, k: int) -> Tensor | None:
    index = f"{name}.weight_g_idx"
    if index not in tensors.entries:
        if setting.ordered:
            raise CheckpointError(f"{index}: is missing, though the configuration says actorder 'group'")
        return None
    order = tensors.shaped(index, (torch.int32,), (k,))
    if (order == -1).all():  # the library's word for none
        return None
    return ordered_groups(order, f"{name}.weight", setting.group_size or k, setting.groups(k))


def _with_static_inputs(weight: ForeignWeight, tensors: Tensors, name: str) -> ForeignWeight:
    """The weight, with the scale and the zero point of static activations where the file has them."""
    scale, zero = f"{name}.input_scale", f"{name}.input_zero_point"
    if scale in tensors.entries:
        found = tensors.shaped(scale, FLOATS, (1,))
        if not (torch.isfinite(found) & (found > 0)).all():
            raise CheckpointError(f"{scale}: must be finite and above 0")
        weight = replace(weight, input_scale=found)
    if zero in tensors.entries:
        weight = replace(weight, input_zero=tensors.shaped(zero, (torch.int8,), (1,)))
    return weight


def plain(name: str, context: Context) -> ForeignWeight:
    """A weight of the formats int-quantized and naive-quantized."""
    codes = context.tensors.typed(f"{name}.weight", (torch.int8,), 2)
    return signed_weight(name, codes, context)


def signed_weight(name: str, codes: Tensor, context: Context) -> ForeignWeight:
    """A weight with signed codes (N, K), from weight_scale and, if there is one, weight_zero_point."""
    tensors, (n, k) = context.tensors, codes.shape
    scale = scales_of(tensors, name)
    low, high = (int(end) for end in codes.aminmax()) if codes.numel() else (0, 0)

    setting = context.setting(
        name,
        lambda setting: setting.fits(scale, n, k) and not setting.floats,
        lambda setting: -(1 << (setting.bits - 1)) <= low and high < 1 << (setting.bits - 1),
    )
    zero: Tensor | int = 0
    if f"{name}.weight_zero_point" in tensors.entries:
        stored = tensors.shaped(f"{name}.weight_zero_point", (torch.int8,), tuple(scale.shape))
        zero = setting.spread(_signed(stored, f"{name}.weight_zero_point", setting.bits), n, k)
    _signed(codes, f"{name}.weight", setting.bits)
    weight = ForeignWeight(
        codes,
        setting.bits,
        setting.spread(scale, n, k),
        zero,
        setting.group_size or k,
        _order(tensors, name, setting, k),
    )
    return checked(_with_static_inputs(weight, tensors, name), name, "weight_scale")
