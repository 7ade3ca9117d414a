"""Static activations: one scale and one zero point for all inputs of a layer, found by calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .activation_type import ActivationType
from .scheme import Scheme

# In this range the scale and its inverse are normal float32 numbers.
LEAST_SCALE, MOST_SCALE = 2.0**-126, 2.0**126
# Bytes of the header of a packed weight: float32 scale, int32 zero point, then 0 (csrc/linear.h).
HEADER = 64

SPEC: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "act_scale": ((1,), torch.float32),
    "act_zero_point": ((1,), torch.int8),
}


class ActScale(NamedTuple):
    """x = (q - zero_point) * scale with the codes q of an ActivationType. Values beyond the ends are clipped.

    scale: float32 (1,) in [2^-126, 2^126]; zero_point: int8 (1,), one of the codes.
    """

    scale: Tensor
    zero_point: Tensor

    @classmethod
    def of_range(cls, low: float, high: float, act_type: ActivationType) -> ActScale:
        """For values from low to high. The range is extended to 0, which is always represented exactly.

        Raises:
            ValueError: the range is not finite, or its scale is not in [2^-126, 2^126].
        """
        low, high = min(low, 0.0), max(high, 0.0)
        scale = torch.tensor([(high - low) / act_type.steps], dtype=torch.float32)
        if not LEAST_SCALE <= scale.item() <= MOST_SCALE:
            raise ValueError(f"range [{low:g}, {high:g}]: its scale {scale.item():g} must be in [2^-126, 2^126]")
        zero = max(act_type.lowest, min(act_type.highest, round(-low / scale.item()) + act_type.lowest))
        return cls(scale, torch.tensor([zero], dtype=torch.int8))

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], act_type: ActivationType) -> ActScale:
        """From a mapping with the names of SPEC; other names are ignored.

        Raises:
            ValueError: one has another shape or dtype, or is out of range.
        """
        for name, (shape, dtype) in SPEC.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}, must be {shape} {dtype}")
        found = cls(*(tensors[name].detach() for name in SPEC))
        if not found.scale.is_meta and not LEAST_SCALE <= found.scale.item() <= MOST_SCALE:
            raise ValueError(f"act_scale: {found.scale.item():g}, must be in [2^-126, 2^126]")
        lowest, highest = act_type.lowest, act_type.highest
        if not found.zero_point.is_meta and not lowest <= found.zero_point.item() <= highest:
            raise ValueError(f"act_zero_point: {found.zero_point.item()}, must be in [{lowest}, {highest}]")
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in a state_dict."""
        return dict(zip(SPEC, self, strict=True))

    def before(self, packed: Tensor) -> Tensor:
        """A packed weight with the header for this scale before it."""
        header = torch.zeros(HEADER, dtype=torch.uint8, device=packed.device)
        header[:4] = self.scale.view(torch.uint8)
        header[4:8] = self.zero_point.int().view(torch.uint8)
        return torch.cat([header, packed])


def scale_of(scheme: Scheme, act_range: tuple[float, float] | None) -> ActScale | None:
    """The scale of a calibrated range for a static scheme; None for another scheme.

    Raises:
        ValueError: a static scheme without a range, or another scheme with one.
    """
    if scheme.static is not (act_range is not None):
        needs = "static activations need the range of calibration" if scheme.static else "the scheme is not static"
        raise ValueError(f"act_range={act_range}, scheme={str(scheme)!r}: {needs}")
    return None if act_range is None else ActScale.of_range(*act_range, scheme.act_type)


def split(packed: Tensor, scheme: Scheme) -> tuple[ActScale | None, Tensor]:
    """The static scale (a copy) and the packed weight without its header; None and the weight if not static."""
    if not scheme.static:
        return None, packed
    if packed.numel() < HEADER:
        raise ValueError(f"packed: has {packed.numel()} bytes, needs {HEADER}")
    head = packed[:8].clone()
    return ActScale(head[:4].view(torch.float32), head[4:].view(torch.int32).to(torch.int8)), packed[HEADER:]
