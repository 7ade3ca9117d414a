"""GPTQ: round one input channel after another; later ones compensate its error (Frantar et al., arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compiled.rounding import quantize_weight
from ...weights.rounding import QuantizedWeight, Ranges
from ...weights.scheme import Scheme
from ..layerwise.factor import Factor, drift_correction, factorize, fill_dead
from ..layerwise.sweep import COLUMNS, FixedMask, Rounder, sweep


@dataclass(frozen=True)
class Solved:
    """A weight rounded by GPTQ.

    quantized: the codes. loss: tr((W - Q) H (W - Q)') with the damped H. order: the order (K,) in which the input
    channels were processed. factor: the factored Hessian, in this order.
    """

    quantized: QuantizedWeight
    loss: float
    factor: Factor
    order: Tensor


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    ranges: Sequence[str] = ("rtn", "mse"),
    drift: Tensor | None = None,
    columns: int = COLUMNS,
) -> Solved | None:
    """Round a weight (N, K) to a dense scheme by the Hessian (K, K) of its inputs.

    Scales and zero points are those of the original weight (static groups), so processing channels by decreasing
    diagonal of the Hessian (act-order) costs nothing at run time. Computes in the wider dtype of weight and Hessian, at
    least float32. Inputs that were always 0 get weights of 0.

    Args:
        ranges: methods of ``weights.rounding`` for the scales; the one with the least loss is taken.
        drift: see ``drift_correction``, which is added to the weight first.
        columns: block size: updates of later channels are applied once per block.

    Returns:
        The result, or None if the Hessian is not finite or cannot be factored.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, hessian.dtype), torch.float32)
    hessian, dead = fill_dead(hessian.to(dtype))
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = factorize(hessian[order][:, order])
    if factor is None:
        return None
    target = weight.detach().to(dtype).masked_fill(dead, 0)
    if drift is not None:
        places = order.argsort()
        target = target + drift_correction(target, drift, factor.upper[:, places])
    tries = [Ranges.of(quantize_weight(target, scheme, method), scheme) for method in ranges]
    return min((_swept(target, scheme, static, factor, order, columns) for static in tries), key=lambda one: one.loss)


def _swept(target: Tensor, scheme: Scheme, static: Ranges, factor: Factor, order: Tensor, columns: int) -> Solved:
    # Transposed, so that each input channel is contiguous.
    work = target[:, order].T.clone(memory_format=torch.contiguous_format)
    rounder = Rounder(scheme, work, order, static)
    _, errors = sweep(work, factor.upper, FixedMask(torch.ones_like(work, dtype=torch.bool), columns), rounder)
    return Solved(rounder.quantized(), errors.double().square().sum().item(), factor, order)
