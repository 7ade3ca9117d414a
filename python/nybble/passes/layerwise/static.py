"""Static activation scales: set from the layer's observer, and kept unless dynamic ones are much better on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from ...model.eligible import dense_weight
from ...model.inputs import NO_DATA, Inputs
from ...nn.kinds import matrix_layer
from ...weights.activation_type import ActivationType
from ...weights.activations import ActScale
from ..plan import Layer
from .errors import relative_error
from .outcome import Outcome

# A static scale is accepted if its output error is at most twice that of dynamic scales, or at most 1 %.
_MAX_RATIO, _SMALL_ERROR = 2.0, 0.01


def with_scale(
    twins: Sequence[Layer],
    outcome: Outcome,
    inputs: Inputs | None,
    act_type: ActivationType,
    make: Callable[[Outcome], nn.Module],
) -> Outcome:
    """The outcome with a static activation scale, or with a note why activations stay dynamic.

    twins: the layers that share this weight. make: builds the layer of an outcome.
    """
    found = _scale(twins, inputs, act_type)
    why = found if isinstance(found, str) else _why_not(twins[0], outcome, replace(outcome, act=found), inputs, make)
    if isinstance(found, str) or why is not None:
        return replace(outcome, notes=(*outcome.notes, f"dynamic activations: {why}"))
    return replace(outcome, act=found)


def _scale(twins: Sequence[Layer], inputs: Inputs | None, act_type: ActivationType) -> ActScale | str:
    """The static scale, or the reason why there is none."""
    if sum(layer.multiplies for layer in twins) > 1:
        return "it shares its weight with other layers, whose inputs differ"
    if len(twins[0].site.names) > 1:
        return "it is registered under several names, whose inputs differ"
    if inputs is None or inputs.observer is None or not inputs.is_usable:
        return NO_DATA
    try:
        return ActScale.of_range(*inputs.observer.range(act_type.steps), act_type)
    except ValueError as error:
        return str(error)


def _why_not(
    layer: Layer, dynamic: Outcome, static: Outcome, inputs: Inputs | None, make: Callable[[Outcome], nn.Module]
) -> str | None:
    """Why the static layer is too much worse than the dynamic one, or None."""
    assert inputs is not None, "a scale was observed"  # noqa: S101
    dense = layer.site.module
    x = inputs.held_out.to(dense_weight(dense).dtype)
    wanted = matrix_layer(dense)(x)
    if not layer.kind.takes_rows and static.scheme is not None:
        # Convolutions round a whole image with one scale, not each of its patches.
        low, high = x.aminmax()
        dynamic = replace(dynamic, act=ActScale.of_range(float(low), float(high), static.scheme.act_type))
    ours, theirs = (relative_error(matrix_layer(make(one))(x), wanted) for one in (static, dynamic))
    if ours <= max(_MAX_RATIO * theirs, _SMALL_ERROR):
        return None
    ratio = ours / theirs if theirs else math.inf
    return (
        f"a static scale has an output error of {100 * ours:.3g} % on held-out data, {ratio:.3g} times the dynamic one"
    )
