"""Where an integer weight may be cut, so that each rank holds a whole weight of a smaller layer."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..weights.levels import BLOCK
from ..weights.scheme import Scheme
from ..weights.sparsity import NofM

OUTPUTS, INPUTS = (
    0,
    1,
)  # the dimension that is cut: torch calls a cut of the outputs column-wise, of the inputs row-wise
_WHOLE = ("book", "act_scale", "act_zero_point")  # tensors that every rank needs whole


def share_of(features: int, ranks: int) -> int:
    """The features of each rank; the last has what is left. That is how torch's Shard cuts."""
    return -(-features // ranks)


def unit_of(scheme: Scheme) -> int:
    """A cut of the inputs must be at a multiple of this."""
    kind, size = scheme.weight_type, scheme.group_size or 1
    if kind.levels:
        size *= BLOCK
    if isinstance(scheme.sparsity, NofM):
        size = math.lcm(size, scheme.sparsity.m)
    return math.lcm(size, kind.per_byte)


def why_not(scheme: Scheme, shape: tuple[int, int], dim: int, ranks: int) -> str | None:
    """Why a weight (out_features, in_features) cannot be cut in a dimension, or None."""
    whole, name = shape[dim], ("out_features", "in_features")[dim]
    share = share_of(whole, ranks)
    if (ranks - 1) * share >= whole:
        return f"{name}={whole}: too few for {ranks} ranks"
    if dim == OUTPUTS:
        return None
    if scheme.ordered:
        return f"scheme={str(scheme)!r}: its columns are in an order of their own, so no rank has the inputs of its columns"
    unit = unit_of(scheme)
    if ranks > 1 and share % unit:
        return (
            f"in_features={whole}, group_size={scheme.group_size}, ranks={ranks}: each rank would get {share} inputs, must be a "
            f"multiple of {unit} under {scheme}"
        )
    return None


def placements(scheme: Scheme, dim: int, names: Iterable[str]) -> dict[str, Placement]:
    """How each portable tensor, and the bias, lies on the ranks."""
    found: dict[str, Placement] = {}
    for name in names:
        if name in _WHOLE or (dim == OUTPUTS and name == "order") or (dim == INPUTS and name == "bias"):
            found[name] = Replicate()
        elif dim == INPUTS and name != "qweight" and scheme.group_size is None:
            found[name] = Replicate()  # one scale for all inputs of an output
        else:
            found[name] = Shard(dim)
    return found
