"""GPTQ: codes chosen input by input, each one's error made up for by those after it (Frantar et al., arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...weights.rounding import QuantizedWeight, Ranges, quantize_weight
from ...weights.scheme import Scheme
from ..layerwise.factor import Factor, factorize, made_up, without_dead
from ..layerwise.sweep import COLUMNS, Fixed, Rounder, sweep


@dataclass(frozen=True)
class Solved:
    """quantized: the codes. loss: tr((W - Q) H (W - Q)') with the damped H. factor: what became of the Hessian, in
    ``order``, the order in which its inputs (K,) were taken."""

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

    Scales and zero points are those of the weight as it is (static groups), by the methods of ``rounding`` that
    ``ranges`` names, of which the one with the least loss counts; the inputs are taken in the order of the Hessian's diagonal, the largest first (act-order), which
    therefore costs nothing when the layer runs. Updates reach inputs beyond the next ``columns`` once for all of these.
    drift: as of ``made_up``; what is rounded then makes up for a part of it. Works in the wider of the dtypes of weight
    and Hessian, at least float32. An input that was always 0 has its weights set to 0. None where the Hessian is not
    finite or cannot be factored.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, hessian.dtype), torch.float32)
    hessian, dead = without_dead(hessian.to(dtype))
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = factorize(hessian[order][:, order])
    if factor is None:
        return None
    target = weight.detach().to(dtype).masked_fill(dead, 0)
    if drift is not None:
        places = order.argsort()
        target = target + made_up(target, drift, factor.upper[:, places])
    tries = [Ranges.of(quantize_weight(target, scheme, method), scheme) for method in ranges]
    return min((_swept(target, scheme, static, factor, order, columns) for static in tries), key=lambda one: one.loss)


def _swept(target: Tensor, scheme: Scheme, static: Ranges, factor: Factor, order: Tensor, columns: int) -> Solved:
    # Inputs along the first axis: what is worked on lies together.
    work = target[:, order].T.clone(memory_format=torch.contiguous_format)
    rounder = Rounder(scheme, work, order, static)
    _, errors = sweep(work, factor.upper, Fixed(torch.ones_like(work, dtype=torch.bool), columns), rounder)
    return Solved(rounder.quantized(), errors.double().square().sum().item(), factor, order)
