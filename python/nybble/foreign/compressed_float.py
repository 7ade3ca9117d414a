"""compressed-tensors' layouts of weights that are small floats.

8 bits: weight, float8_e4m3fn (N, K), with scales of any strategy, or of groups of 32, as exponents (mxfp8). 4 bits: weight_packed,
uint8 (N, K / 2), the first code of a byte in its low half; weight_scale: exponents, uint8, of groups of 32 (mxfp4), or
float8_e4m3fn of groups of 16, divided by weight_global_scale (nvfp4). Scales of activations are not used: they stay floats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from .compressed_dense import scales_of
from .compressed_setting import Context
from .float_codes import FLOAT4, float8_codes, powers_of_two
from .tensors import Tensors
from .weight import ForeignWeight, checked


def eight(name: str, context: Context) -> ForeignWeight:
    """A weight of the formats float-quantized, naive-quantized and mxfp8-quantized."""
    tensors = context.tensors
    stored = tensors.typed(f"{name}.weight", (torch.float8_e4m3fn,), 2)
    codes, book = float8_codes(stored, f"{name}.weight")
    exponents = tensors.entries[f"{name}.weight_scale"].dtype == torch.uint8
    scale = powers_of_two(tensors.read(f"{name}.weight_scale")) if exponents else scales_of(tensors, name)
    return _weight(name, context, codes, scale, book)


def four(name: str, context: Context) -> ForeignWeight:
    """A weight of the formats mxfp4-pack-quantized and nvfp4-pack-quantized."""
    tensors = context.tensors
    codes = tensors.typed(f"{name}.weight_packed", (torch.uint8,), 2)
    return _weight(name, context, codes, _scales4(tensors, name), torch.tensor(FLOAT4))


def _scales4(tensors: Tensors, name: str) -> Tensor:
    scale, whole = f"{name}.weight_scale", f"{name}.weight_global_scale"
    if whole not in tensors.entries:
        return powers_of_two(tensors.typed(scale, (torch.uint8,), 2))
    divisor = tensors.shaped(whole, (torch.float32,), (1,))
    if not (torch.isfinite(divisor) & (divisor > 0)).all():
        raise CheckpointError(f"{whole}: must be finite and above 0")
    return tensors.typed(scale, (torch.float8_e4m3fn,), 2).float() / divisor


def _weight(name: str, context: Context, codes: Tensor, scale: Tensor, book: Tensor) -> ForeignWeight:
    per_byte = 2 if len(book) == len(FLOAT4) else 1
    bits, n, k = 8 // per_byte, codes.shape[0], codes.shape[1] * per_byte
    setting = context.setting(
        name, lambda setting: setting.floats and setting.bits == bits and setting.fits(scale, n, k)
    )
    weight = ForeignWeight(
        codes,
        bits,
        setting.spread(scale, n, k),
        group_size=setting.group_size or k,
        book=book,
        per_byte=per_byte,
    )
    return checked(weight, name, "weight_scale")
