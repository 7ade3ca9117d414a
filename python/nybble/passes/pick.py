"""Choose among several schemes for one layer: the fastest of those that are exact enough, both measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.eligible import dense_weight
from ..nn.kinds import matrix_layer
from ..nn.module import QuantizedModule
from ..report.data import NOT_TIMED, Tried
from ..report.speed import Speed, mean_speed, product
from .build import Builder
from .layerwise.errors import relative_error
from .layerwise.outcome import Outcome
from .measure import Speeds
from .plan import Layer

# Rows of normal random numbers that stand for inputs where there is no calibration data.
_ROWS = 64


# A less exact scheme must be that much faster, since the place of its buffers alone makes some percent.
_WORTH = 1.03


class _Candidate(NamedTuple):
    outcome: Outcome
    new: QuantizedModule
    error: float

    @property
    def name(self) -> str:
        """The scheme of the layer, which differs from that asked for if its activations stay dynamic."""
        return str(self.new.scheme)


class _Judged(NamedTuple):
    """``why``: why the candidate is not taken, or None; ``speeds``: over the dense layer, for each M, if measured."""

    why: str | None
    speeds: Speeds

    @property
    def mean(self) -> Speed | None:
        return _mean(self.speeds)


def pick(
    twins: Sequence[Layer],
    outcomes: Sequence[Outcome],
    refused: Mapping[str, str],
    make: Callable[[Layer, Outcome], QuantizedModule],
    x: Tensor | None,
    builder: Builder,
) -> Outcome | None:
    """The outcome to use for layers that share a weight, one for each scheme, or None: they get a ``reason``.

    The candidates are tried from the most exact one on; a less exact one must be measured to be faster than the best
    so far, or with ``goal="memory"`` be smaller.

    Args:
        refused: scheme -> why the layers cannot have it.
        make: builds the replacement of an outcome.
        x: inputs (T, K) on which errors are measured; None: random ones.
        builder: measures speeds, and has the options.
    """
    first = twins[0]
    candidates = sorted(_candidates(first, outcomes, make, x), key=lambda one: one.error)
    best: _Candidate | None = None
    judged: dict[str, _Judged] = {}
    for one in candidates:
        known = None if best is None else judged[best.name].speeds
        judged[one.name] = _judge(first, one, best, known or {}, builder)
        if judged[one.name].why is None:
            if best is not None:
                better = "smaller" if builder.options.goal == "memory" else "faster"
                judged[best.name] = judged[best.name]._replace(why=f"{one.name} is {better}")
            best = one
    tried = [Tried(one.name, one.error, judged[one.name].mean, judged[one.name].why) for one in candidates]
    tried += [Tried(name, None, None, why) for name, why in {**refused, **_dynamic(outcomes)}.items()]
    timed = [judged[one.name].speeds for one in candidates if judged[one.name].speeds]
    for layer in twins:
        layer.tried = tuple(tried)
        if best is None:
            layer.reason = "; ".join(f"not {one.scheme}: {one.why}" for one in tried)
            layer.speeds = timed[0] if timed else {}
    return None if best is None else best.outcome


def _dynamic(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Static schemes whose activations stay dynamic -> why."""
    found = [one for one in outcomes if one.scheme is not None and one.scheme.static and one.act is None]
    return {str(one.scheme): one.notes[-1] for one in found}


def _candidates(
    layer: Layer,
    outcomes: Sequence[Outcome],
    make: Callable[[Layer, Outcome], QuantizedModule],
    x: Tensor | None,
) -> list[_Candidate]:
    dense = layer.site.module
    weight = dense_weight(dense)
    if x is None or not len(x):
        x = torch.randn(_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(weight.dtype)
    wanted = matrix_layer(dense)(x)
    found: dict[str, _Candidate] = {}
    for outcome in outcomes:
        new = make(layer, outcome)
        error = relative_error(matrix_layer(new)(x), wanted)
        one = _Candidate(outcome, new, error if math.isfinite(error) else math.inf)
        found.setdefault(one.name, one)
    return list(found.values())


def _judge(layer: Layer, one: _Candidate, best: _Candidate | None, known: Speeds, builder: Builder) -> _Judged:
    """``known``: the speeds of the best over the dense layer."""
    options = builder.options
    if options.max_error is not None and not one.error <= options.max_error:
        return _Judged(f"its error is above max_error={options.max_error:g}", {})
    kernels = builder.kernels(one.new)
    if isinstance(kernels, str):
        return _Judged(kernels, {})
    if options.goal == "memory":
        if best is not None and one.new.nbytes >= best.new.nbytes:
            return _Judged(f"not smaller than {best.name}", {})
        return _Judged(None, {})
    dense = layer.site.module
    speeds = builder.speeds(layer, dense if best is None else best.new, one.new)
    mean = _mean(speeds)
    if mean is None:
        return _Judged(NOT_TIMED, {})
    if best is None:
        return _Judged(None if builder.keeps(layer, mean) else f"{mean.verdict} against dense", speeds)
    # What is faster than the best need not be timed against the dense layer too.
    over_dense = {m: product(known[m], speed) for m, speed in speeds.items()}
    builder.timer.put(dense, one.new, over_dense)
    if mean.low > _WORTH:
        return _Judged(None, over_dense)
    verdict = f"less than {100 * (_WORTH - 1):.0f} % faster" if mean.is_faster else mean.verdict
    return _Judged(f"{verdict} against {best.name}, {mean}", over_dense)


def _mean(speeds: Speeds) -> Speed | None:
    return mean_speed(list(speeds.values())) if speeds else None
