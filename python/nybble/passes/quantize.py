"""Swap the Linear layers of a model for quantized ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..nn import Linear
from ..report import Report
from ..rounding import METHODS
from ..scheme import Scheme
from . import options
from .build import Builder, check_model, refuse_left
from .eligible import dense_weight
from .plan import Layer, Plan
from .rows import make_report
from .walk import sites, swap


def quantize(
    model: nn.Module,
    scheme: str | Scheme = "w8a8",
    *,
    include: options.Patterns = None,
    exclude: options.Patterns = None,
    method: str = "rtn",
    m: int | Sequence[int] = (1, 16, 256),
    goal: str = "speed",
    strict: bool = False,
    untie: bool = False,
) -> Report:
    """Quantize the Linear layers of ``model`` in place and report on every layer.

    Swapped are modules that are exactly ``nn.Linear`` or transformers' ``Conv1D``, in float32, bfloat16 or float16 on
    the CPU. Everything else is left alone and the report says why. Nothing is excluded by name.

    Args:
        model: any module; its Linear layers must be inside it, not the model itself.
        scheme: what the weights and activations become, such as ``"w8a8"``, ``"w4a8g128"`` or a ``Scheme``.
        include: glob patterns on full module names; only layers that match one are quantized. None means all.
        exclude: glob patterns on full module names; layers that match one are left alone.
        method: how weights are rounded, ``"rtn"`` (to nearest) or ``"mse"`` (search for the scale).
        m: the batch sizes (rows of the activation) at which speed counts.
        goal: ``"speed"`` swaps a layer only where the geometric mean over ``m`` of dense time / nybble time, measured
            here with the threads set now, is above 1. ``"memory"`` swaps every layer and times nothing.
        strict: raise if any Linear-like layer that ``include`` and ``exclude`` allow would stay dense.
        untie: quantize a copy of a weight that an ``nn.Embedding`` or another dense layer also uses. By default such
            a layer is left alone. Quantized layers that share one weight stay tied either way.

    Returns:
        A ``Report``. Layers keep their training flag; the bias stays the same parameter.

    Raises:
        TypeError, ValueError: an argument is wrong, the model is itself a Linear layer, or ``strict`` failed. After
            any exception, ``KeyboardInterrupt`` included, the model is as it was.
    """
    check_model(model)
    options.check_flag("strict", strict)
    options.check_flag("untie", untie)
    found = sites(model)
    asked = options.Options(
        scheme=Scheme.parse(scheme),
        include=None if include is None else options.check_patterns("include", include, found),
        exclude=options.check_patterns("exclude", exclude, found),
        method=options.check_choice("method", method, METHODS),
        m=options.check_m(m),
        goal=options.check_choice("goal", goal, options.GOALS),
    )
    plan = Plan(found, asked)
    if not untie:
        plan.leave_tied()
    # a caller in inference mode must not get tensors that autograd can never use
    with torch.inference_mode(False), torch.no_grad():
        builder = Builder(asked)
        for twins in plan.twins():
            builder.build(twins, lambda layer: _quantized(layer, scheme, method))
        if strict:
            refuse_left(plan)
        report = make_report(plan, str(asked.scheme))
    swap((layer.site, layer.new) for layer in plan.layers if layer.new is not None)
    return report


def _quantized(layer: Layer, scheme: str | Scheme, method: str) -> Linear:
    return Linear.from_weight(dense_weight(layer.site.module), layer.bias, scheme, method)
