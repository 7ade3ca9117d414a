"""Static activations of a foreign checkpoint: nybble's where the scheme has quantized ones."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..weights.activations import LEAST_SCALE, MOST_SCALE, ActScale
from ..weights.scheme import Scheme
from .weight import ForeignWeight


def of(weight: ForeignWeight, scheme: Scheme) -> tuple[Scheme, ActScale | None, str | None]:
    """The scheme with the static activations of the file, and their scale; and what is to be said of them, or None.

    x = (q - zero) * scale in both, with codes from -128 to 127.
    """
    if weight.input_scale is None:
        return scheme, None, None
    scale = weight.input_scale.float().reshape(1)
    told = f"static inputs (scale {scale.item():.4g})"
    if not scheme.act_type.quantized:
        return scheme, None, f"{told} are not used: activations are floats"
    zero = torch.zeros(1, dtype=torch.int8) if weight.input_zero is None else weight.input_zero.reshape(1)
    lowest, highest = scheme.act_type.lowest, scheme.act_type.highest
    if not LEAST_SCALE <= scale.item() <= MOST_SCALE or not lowest <= zero.item() <= highest:
        return scheme, None, f"{told} are not used: {scheme.act_type.name} has not this scale or zero point"
    return replace(scheme, static=True), ActScale(scale, zero), f"{told} as in the file"
