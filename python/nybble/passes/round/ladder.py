"""Round one weight: the method that was asked for, or the next simpler one where that cannot be or does worse."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ...model.inputs import NO_DATA, Inputs
from ...weights.rounding import METHODS as PLAIN
from ...weights.rounding import QuantizedWeight, dequantize_weight, quantize_weight
from ...weights.scheme import Scheme
from ..layerwise.judge import weight_loss
from ..layerwise.outcome import Outcome
from .clip import clip
from .gptq import gptq

# Each method, and what it falls back to.
LADDER: dict[str, tuple[str, ...]] = {
    "rtn": (),
    "mse": ("rtn",),
    "hqq": ("rtn",),
    "awq": ("rtn",),
    "gptq": ("mse", "rtn"),
}
METHODS: tuple[str, ...] = tuple(LADDER)
NEEDS_DATA = ("awq", "gptq")

_Try = Callable[[Tensor, Scheme, Inputs, list[str]], QuantizedWeight | None]


def round_weight(weight: Tensor, scheme: Scheme, method: str, inputs: Inputs | None = None) -> Outcome:
    """Round a finite weight (N, K), any float dtype, to a dense scheme.

    Where there is data, a method that does worse than rounding to nearest on inputs held out gives way to the next of
    its ladder. The notes say so.
    """
    usable = inputs is not None and inputs.is_usable
    notes = [] if inputs is None else inputs.notes()
    nearest = quantize_weight(weight, scheme)
    if inputs is None or not usable:
        if method in NEEDS_DATA:
            notes.append(f"rtn instead of {method}: {NO_DATA}")
            return Outcome(None, "rtn", tuple(notes), nearest)
        return Outcome(None, method, tuple(notes), quantize_weight(weight, scheme, method))
    bound = _loss(weight, nearest, scheme, inputs)
    for tried in (method, *LADDER[method]):
        found = _METHODS[tried](weight, scheme, inputs, notes)
        if found is None:
            continue
        loss = _loss(weight, found, scheme, inputs)
        if loss <= bound:
            return Outcome(None, tried, tuple(notes), found)
        notes.append(f"not {tried}: its loss on inputs held out is {loss / bound if bound else math.inf:.3g} of rtn's")
    raise AssertionError("every ladder ends in rtn")


def _loss(weight: Tensor, quantized: QuantizedWeight, scheme: Scheme, inputs: Inputs) -> float:
    return weight_loss(weight, dequantize_weight(quantized, scheme, weight.shape[1]), inputs.held_out)


def _plain(method: str) -> _Try:
    return lambda weight, scheme, inputs, notes: quantize_weight(weight, scheme, method)


def _awq(weight: Tensor, scheme: Scheme, inputs: Inputs, notes: list[str]) -> QuantizedWeight | None:
    """Its scales are in the weight already; here are the ranges."""
    assert inputs.hessian is not None, "gathered for this method"  # noqa: S101
    return clip(weight, inputs.hessian, scheme)


def _gptq(weight: Tensor, scheme: Scheme, inputs: Inputs, notes: list[str]) -> QuantizedWeight | None:
    assert inputs.hessian is not None, "gathered for this method"  # noqa: S101
    solved = gptq(weight, inputs.hessian, scheme, drift=inputs.drift)
    if solved is None:
        notes.append("not gptq: no usable Hessian")
        return None
    if inputs.rows < weight.shape[1]:
        notes.append(f"{inputs.rows} rows of data for {weight.shape[1]} inputs: few for gptq")
    if solved.factor.how is not None:
        notes.append(solved.factor.how)
    return solved.quantized


_METHODS: dict[str, _Try] = {**{name: _plain(name) for name in PLAIN}, "awq": _awq, "gptq": _gptq}
