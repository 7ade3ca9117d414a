"""Whether the inputs of a layer get a static scale: found by its observer, and held to dynamic ones on inputs held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from ...model.eligible import dense_weight
from ...model.inputs import NO_DATA, Inputs
from ...weights.activations import ActScale
from ..plan import Layer
from .judge import relative_error
from .outcome import Outcome

# A static scale may multiply the output error of dynamic ones by so much, or end at so little.
_TIMES, _LITTLE = 2.0, 0.01


def with_scale(
    twins: Sequence[Layer], outcome: Outcome, inputs: Inputs | None, make: Callable[[Outcome], nn.Module]
) -> Outcome:
    """What a method made of a layer's weight, with a scale for its inputs, or with a note why they stay dynamic.

    twins: the layers on this weight. make: gives the layer of an outcome.
    """
    found = _scale(twins, inputs)
    why = found if isinstance(found, str) else _why_not(twins[0], outcome, replace(outcome, act=found), inputs, make)
    if isinstance(found, str) or why is not None:
        return replace(outcome, notes=(*outcome.notes, f"dynamic activations: {why}"))
    return replace(outcome, act=found)


def _scale(twins: Sequence[Layer], inputs: Inputs | None) -> ActScale | str:
    """The scale, or why there is none."""
    if len(twins) > 1:
        return "it shares its weight with other layers, whose inputs differ"
    if len(twins[0].site.names) > 1:
        return "it stands at several places, whose inputs differ"
    if inputs is None or inputs.observer is None or not inputs.is_usable:
        return NO_DATA
    try:
        return ActScale.of_range(*inputs.observer.range())
    except ValueError as error:
        return str(error)


def _why_not(
    layer: Layer, dynamic: Outcome, static: Outcome, inputs: Inputs | None, make: Callable[[Outcome], nn.Module]
) -> str | None:
    """Why a static layer is too much worse than the dynamic one, or None."""
    assert inputs is not None, "it was observed"  # noqa: S101
    dense = layer.site.module
    x = inputs.held_out.to(dense_weight(dense).dtype)
    wanted = dense(x)
    ours, theirs = (relative_error(make(one)(x), wanted) for one in (static, dynamic))
    if ours <= max(_TIMES * theirs, _LITTLE):
        return None
    ratio = ours / theirs if theirs else math.inf
    return f"with a static scale the output error on inputs held out is {100 * ours:.3g} %, {ratio:.3g} times as much"
