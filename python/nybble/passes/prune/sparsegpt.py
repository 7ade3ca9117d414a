"""SparseGPT (Frantar and Alistarh, arXiv:2301.00774): choose the mask and update the kept weights by the Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...weights.rounding import QuantizedWeight
from ...weights.scheme import Scheme
from ...weights.sparsity import Pattern
from ..layerwise.factor import Factor, drift_correction, factorize, fill_dead
from ..layerwise.sweep import FixedMask, Rounder, sweep
from .choosers import chooser
from .refit import refit


@dataclass(frozen=True)
class Solved:
    """A pruned weight.

    weight: (N, K), dequantized if it was rounded. keep: the mask, bool (N, K). quantized: the codes, or None.
    factor: the factored Hessian.
    """

    weight: Tensor
    keep: Tensor
    quantized: QuantizedWeight | None
    factor: Factor


def sparsegpt(
    weight: Tensor, hessian: Tensor, pattern: Pattern, scheme: Scheme | None = None, drift: Tensor | None = None
) -> Solved | None:
    """Prune a weight (N, K) by the Hessian (K, K) of its inputs; round it if a dense symmetric scheme is given.

    A first sweep chooses the mask, ``refit`` finds the best weights for it, and with a scheme a second sweep rounds
    these. Computes in the wider dtype of weight and Hessian, at least float32. Inputs that were always 0 get weights of
    0. Returns None if the Hessian is not finite or cannot be factored, or the result is not finite.

    drift: see ``drift_correction``, which is added to the weight first.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, hessian.dtype), torch.float32)
    hessian, dead = fill_dead(hessian.to(dtype))
    factor = factorize(hessian)
    if factor is None:
        return None
    target = weight.detach().to(dtype).masked_fill(dead, 0)
    if drift is not None:
        target = target + drift_correction(target, drift, factor.upper)
    # Transposed, so that each input channel is contiguous.
    columns = target.T.clone(memory_format=torch.contiguous_format)
    keep, _ = sweep(columns, factor.upper, chooser(pattern, columns))
    found = refit(columns.T.contiguous(), keep.T.contiguous(), target, factor.hessian)
    quantized = None
    if scheme is not None and torch.isfinite(found).all():
        columns = found.T.clone(memory_format=torch.contiguous_format)
        rounder = Rounder(scheme, columns)
        sweep(columns, factor.upper, FixedMask(keep), rounder)
        found, quantized = columns.T.contiguous(), rounder.quantized()
    if not torch.isfinite(found).all():
        return None
    return Solved(found, keep.T.contiguous(), quantized, factor)
