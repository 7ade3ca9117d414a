"""Fake quantization of weights to other than 4 or 8 bits, to estimate the loss of formats without a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.eligible import is_linear_like
from ..model.stages import eval_mode, stages
from ..model.walk import sites
from ..passes.layerwise.factor import factorize, fill_dead
from ..passes.layerwise.sweep import FixedMask, Rounder, sweep

GROUP = 128


class Bits(Rounder):
    """Rounds columns (K, N) asymmetrically to `bits` bits; scales per GROUP inputs, from the weight before GPTQ."""

    def __init__(self, bits: int, columns: Tensor, order: Tensor) -> None:
        self._top, self._columns, self._groups = 2**bits - 1, columns, (order // GROUP).tolist()
        whole = torch.empty_like(columns)
        whole[order] = columns
        parts = whole.split(GROUP)
        low = torch.stack([part.amin(0).clamp(max=0) for part in parts])
        high = torch.stack([part.amax(0).clamp(min=0) for part in parts])
        self._scale = ((high - low) / self._top).clamp(min=1e-12)
        self._zero = (-low / self._scale).round()

    def round(self, i: int) -> Tensor:
        """Row i of the columns, quantized and dequantized."""
        scale, zero = self._scale[self._groups[i]], self._zero[self._groups[i]]
        codes = (self._columns[i] / scale + zero).round().clamp(0, self._top)
        value: Tensor = (codes - zero) * scale
        return value


def nearest(weight: Tensor, bits: int) -> Tensor:
    """A weight (N, K) rounded to nearest."""
    columns = weight.detach().float().T.contiguous()
    rounder = Bits(bits, columns, torch.arange(len(columns)))
    return torch.stack([rounder.round(i) for i in range(len(columns))]).T.to(weight.dtype)


def by_gptq(weight: Tensor, hessian: Tensor, bits: int) -> Tensor:
    """A weight (N, K) rounded by GPTQ (act-order, static groups), given the Hessian (K, K) of its inputs.

    Raises:
        ValueError: the Hessian cannot be factored.
    """
    hessian, dead = fill_dead(hessian)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = factorize(hessian[order][:, order])
    if factor is None:
        raise ValueError("hessian: cannot be factored")
    columns = weight.detach().float().masked_fill(dead, 0)[:, order].T.contiguous()
    sweep(columns, factor.upper, FixedMask(torch.ones_like(columns, dtype=torch.bool)), Bits(bits, columns, order))
    return columns[order.argsort()].T.to(weight.dtype)


def simulate(model: nn.Module, bits: int, calibration: Sequence[Tensor] | None) -> None:
    """Rounds the weights of the model's blocks in place: to nearest, or by GPTQ on the outputs of the rounded blocks
    before it."""
    causal: Any = model
    layers = [site for site in sites(causal.model.layers) if is_linear_like(site.module)]
    with torch.no_grad(), eval_mode(model):
        for stage in stages(model, calibration, layers):
            inputs = {} if calibration is None else stage.inputs(hessian=True)
            for layer in stage.layers:
                weight = layer.module.weight
                assert isinstance(weight, nn.Parameter), "the layers are dense"  # noqa: S101
                found = inputs.get(id(layer.module))
                if found is None or found.hessian is None:
                    weight.copy_(nearest(weight, bits))
                else:
                    weight.copy_(by_gptq(weight, found.hessian, bits))
