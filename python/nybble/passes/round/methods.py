"""Round one weight by the requested method, or fall back to a simpler one if it fails or is worse on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ...compiled.rounding import quantize_weight
from ...model.inputs import NO_DATA, Inputs
from ...weights.rounding import METHODS as PLAIN
from ...weights.rounding import QuantizedWeight, dequantize_weight
from ...weights.scheme import Scheme
from ..layerwise.errors import weight_loss
from ..layerwise.outcome import Outcome
from .clip import clip
from .gptq import gptq

# Each method, and what it falls back to.
FALLBACKS: dict[str, tuple[str, ...]] = {
    "rtn": (),
    "mse": ("rtn",),
    "hqq": ("rtn",),
    "awq": ("rtn",),
    "gptq": ("mse", "rtn"),
}
METHODS: tuple[str, ...] = tuple(FALLBACKS)
NEEDS_DATA = ("awq", "gptq")

_Try = Callable[[Tensor, Scheme, Inputs, list[str]], QuantizedWeight | None]


def round_weight(weight: Tensor, scheme: Scheme, method: str, inputs: Inputs | None = None) -> Outcome:
    """Round a finite weight (N, K), any float dtype, to a dense scheme.

    With data, a method that fails or is worse than rounding to nearest on held-out data falls back to the next one in
    ``FALLBACKS``. The notes say so.
    """
    usable = inputs is not None and inputs.is_usable
    notes = [] if inputs is None else inputs.notes()
    if method in NEEDS_DATA and not usable:
        notes.append(f"rtn instead of {method}: {NO_DATA}")
        method = "rtn"
    if inputs is None or not usable or method == "rtn":
        return Outcome(None, method, tuple(notes), quantize_weight(weight, scheme, method))
    nearest = quantize_weight(weight, scheme)
    bound = _loss(weight, nearest, scheme, inputs)
    for tried in (method, *FALLBACKS[method]):
        found = _METHODS[tried](weight, scheme, inputs, notes)
        if found is None:
            continue
        loss = _loss(weight, found, scheme, inputs)
        if loss <= bound:
            return Outcome(None, tried, tuple(notes), found)
        ratio = loss / bound if bound else math.inf
        notes.append(f"not {tried}: its loss on held-out data is {ratio:.3g} times that of rtn")
    raise AssertionError("rtn is always accepted")


def _loss(weight: Tensor, quantized: QuantizedWeight, scheme: Scheme, inputs: Inputs) -> float:
    return weight_loss(weight, dequantize_weight(quantized, scheme, weight.shape[1]), inputs.held_out)


def _plain(method: str) -> _Try:
    return lambda weight, scheme, inputs, notes: quantize_weight(weight, scheme, method)


def _awq(weight: Tensor, scheme: Scheme, inputs: Inputs, notes: list[str]) -> QuantizedWeight | None:
    """The clipping part of AWQ; its scales are already folded into the weight."""
    assert inputs.hessian is not None, "gathered for this method"  # noqa: S101
    return clip(weight, inputs.hessian, scheme)


def _gptq(weight: Tensor, scheme: Scheme, inputs: Inputs, notes: list[str]) -> QuantizedWeight | None:
    assert inputs.hessian is not None, "gathered for this method"  # noqa: S101
    solved = gptq(weight, inputs.hessian, scheme, drift=inputs.drift)
    if solved is None:
        notes.append("not gptq: the Hessian is not finite or cannot be factored")
        return None
    if inputs.rows < weight.shape[1]:
        notes.append(f"only {inputs.rows} rows of calibration data for {weight.shape[1]} inputs; gptq needs more")
    if solved.factor.note is not None:
        notes.append(solved.factor.note)
    return solved.quantized


_METHODS: dict[str, _Try] = {**{name: _plain(name) for name in PLAIN}, "awq": _awq, "gptq": _gptq}
