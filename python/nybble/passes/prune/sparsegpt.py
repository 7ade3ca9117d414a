"""SparseGPT: the mask and the weights that stay are chosen together, by the loss on the layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...weights.rounding import QuantizedWeight
from ...weights.scheme import Scheme
from ...weights.sparsity import Pattern
from ..layerwise.factor import Factor, factorize, made_up, without_dead
from ..layerwise.sweep import Fixed, Rounder, sweep
from .choosers import chooser
from .refit import refit


@dataclass(frozen=True)
class Solved:
    """A pruned weight.

    weight: (N, K), as the codes say where it was rounded. keep: bool (N, K). quantized: the codes, or None.
    factor: what became of the Hessian.
    """

    weight: Tensor
    keep: Tensor
    quantized: QuantizedWeight | None
    factor: Factor


def sparsegpt(
    weight: Tensor, hessian: Tensor, pattern: Pattern, scheme: Scheme | None = None, drift: Tensor | None = None
) -> Solved | None:
    """Prune a weight (N, K), and round what stays to a dense symmetric scheme if one is given.

    drift: (2 / rows) * sum of (d - x) x' (K, K), where d is what x was before anything was pruned. The weight then
    makes up for a quarter of that too: W + W drift H^-1 / 4 is what is pruned (all of it overfits; cf. GPTAQ).

    A first sweep chooses the mask, ``refit`` then finds the best weights for it, and with a scheme a second sweep
    rounds these. Works in the wider of the dtypes of weight and hessian (K, K), at least float32. An input that was
    always 0 has its weights set to 0. None where the Hessian is not finite or cannot be factored, or the result is not
    finite.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, hessian.dtype), torch.float32)
    hessian, dead = without_dead(hessian.to(dtype))
    factor = factorize(hessian)
    if factor is None:
        return None
    target = weight.detach().to(dtype).masked_fill(dead, 0)
    if drift is not None:
        target = target + made_up(target, drift, factor.upper)
    # Inputs along the first axis: what is worked on lies together.
    columns = target.T.clone(memory_format=torch.contiguous_format)
    keep, _ = sweep(columns, factor.upper, chooser(pattern, columns))
    found = refit(columns.T.contiguous(), keep.T.contiguous(), target, factor.hessian)
    quantized = None
    if scheme is not None and torch.isfinite(found).all():
        columns = found.T.clone(memory_format=torch.contiguous_format)
        rounder = Rounder(scheme, columns)
        sweep(columns, factor.upper, Fixed(keep), rounder)
        found, quantized = columns.T.contiguous(), rounder.quantized()
    if not torch.isfinite(found).all():
        return None
    return Solved(found, keep.T.contiguous(), quantized, factor)
