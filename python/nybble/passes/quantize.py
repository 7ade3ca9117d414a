"""Swap the Linear layers of a model for quantized ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..nn import Linear
from ..report import Report, geometric_mean
from ..rounding import METHODS
from ..scheme import Scheme
from . import measure, options
from .eligible import ALREADY, dense_weight, is_linear_like
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
    _check_model(model)
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
        _build(plan)
        if strict:
            _refuse_left(plan)
        report = make_report(plan)
    swap((layer.site, layer.new) for layer in plan.layers if layer.new is not None)
    return report


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}: wants a torch.nn.Module")
    if is_linear_like(model):
        raise ValueError(
            f"model={type(model).__name__}: is itself a Linear layer and cannot be swapped in place; "
            "use nybble.nn.Linear.from_dense(model, scheme)"
        )


def _build(plan: Plan) -> None:
    """Make the new layers aside, twins on one packed weight, and leave those alone that do not pay."""
    refused: dict[object, Layer] = {}
    for twins in plan.twins():
        if not any(_problem(layer) in refused for layer in twins):
            for layer in twins:
                layer.new = _quantized(layer, twins[0], plan.options)
                layer.reason = _why_drop(layer, layer.new, plan.options)
                if layer.reason is not None:
                    refused[_problem(layer)] = layer
        _leave_refused(twins, refused)


def _leave_refused(twins: Sequence[Layer], refused: Mapping[object, Layer]) -> None:
    """Twins stay together: when one is refused, all stay dense."""
    culprits = {layer.site.name: refused.get(_problem(layer)) for layer in twins}
    if not any(culprits.values()):
        return
    name = next(name for name, culprit in culprits.items() if culprit)
    for layer in twins:
        culprit = culprits[layer.site.name]
        layer.new = layer.tied_to = None
        if culprit is None:
            layer.reason = f"shares its weight with {name}, which is left alone"
        else:
            layer.reason, layer.kernels, layer.speedup = culprit.reason, culprit.kernels, culprit.speedup


def _problem(layer: Layer) -> object:
    """Layers with equal problems run the same kernels at the same speed."""
    kind = type(layer.site.module)
    return kind, layer.weight.shape, layer.weight.dtype, layer.bias is not None


def _quantized(layer: Layer, first: Layer, asked: options.Options) -> Linear:
    module = layer.site.module
    weight = dense_weight(module)
    if first.new is None:
        new = Linear.from_weight(weight, layer.bias, asked.scheme, asked.method)
    else:
        n, k = weight.shape
        new = Linear(k, n, bias=False, scheme=asked.scheme, device="meta", dtype=weight.dtype)
        new.tie_to(first.new)
        new.bias = layer.bias
        layer.tied_to = first
    return new.train(module.training)


def _why_drop(layer: Layer, new: Linear, asked: options.Options) -> str | None:
    """Find the kernels and the speed of a built layer; say why it should not be swapped, if so."""
    for m in asked.m:
        choice = new.explain(m)
        if choice.kernel is None:
            return f"no kernel runs it at M={m}: " + "; ".join(f"{k}: {why}" for k, why in choice.rejected.items())
        layer.kernels[m] = choice.kernel
    if asked.goal == "speed":
        layer.speedup = measure.speedups(layer.site.module, new, layer.kernels)
        mean = geometric_mean(tuple(layer.speedup.values()))
        if mean <= 1:
            return f"slower here: {mean:.2f}x dense speed (geometric mean over M={', '.join(map(str, asked.m))})"
    return None


def _refuse_left(plan: Plan) -> None:
    left = [layer for layer in plan.layers if layer.asked and layer.reason not in (None, ALREADY)]
    if left:
        names = "; ".join(f"{layer.site.name}: {layer.reason}" for layer in left)
        raise ValueError(f"strict=True: {len(left)} of {len(plan.layers)} layers would be left alone: {names}")
