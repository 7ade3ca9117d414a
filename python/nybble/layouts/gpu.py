"""What the layouts for GPUs share: padding, and scales by group or by output. Plain torch, on the weight's device."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad as zero_pad

from ..weights.rounding import QuantizedWeight
from ..weights.scheme import Scheme
from .layout import round_up

TILE = 64


def padded_to_tiles(scheme: Scheme, out_features: int, in_features: int) -> tuple[int, int]:
    """Output features to 64, with scale 0; inputs to 64 or to the group size, with code 0.

    The kernels read the activations there as 0, so the padding adds nothing.
    """
    return round_up(out_features, TILE), round_up(in_features, max(TILE, scheme.group_size or 0))


def groups_of(scheme: Scheme, k_padded: int) -> int:
    """Groups of a padded row; those beyond the last input have scale 0."""
    return k_padded // (scheme.group_size or k_padded)


def by_group(quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> dict[str, Tensor]:
    """Scales and zero points, padded, by group, then output."""
    n, k = padded_to_tiles(scheme, quantized.qweight.shape[0], in_features)
    groups, found = groups_of(scheme, k), {}
    for name in ("scale", "zero_point"):
        tensor = quantized.tensors().get(name)
        if tensor is not None:
            found[name] = zero_pad(tensor, (0, groups - tensor.shape[1], 0, n - len(tensor))).t()
    return found


def by_output(parts: dict[str, Tensor], scheme: Scheme, out_features: int, in_features: int) -> dict[str, Tensor]:
    """The inverse of by_group."""
    groups = scheme.groups(in_features)
    return {
        name: parts[name][:groups, :out_features].t().contiguous() for name in ("scale", "zero_point") if name in parts
    }
