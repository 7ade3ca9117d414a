"""Choose among several schemes for one layer: the fastest of those that are exact enough, both measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..model.eligible import dense_weight
from ..nn.module import QuantizedModule
from ..report.data import Tried
from ..report.speed import Speed, mean_speed
from .build import Builder
from .layerwise.errors import relative_error
from .layerwise.outcome import Outcome
from .plan import Layer

# Rows of normal random numbers that stand for inputs where there is no calibration data.
_ROWS = 64


class _Candidate(NamedTuple):
    outcome: Outcome
    new: QuantizedModule
    error: float

    @property
    def name(self) -> str:
        return str(self.outcome.scheme)


class _Judged(NamedTuple):
    """``why``: why the candidate is not taken, or None; ``speed``: over the dense layer, if measured."""

    why: str | None
    speed: Speed | None = None


def pick(
    twins: Sequence[Layer],
    outcomes: Sequence[Outcome],
    make: Callable[[Layer, Outcome], QuantizedModule],
    x: Tensor | None,
    builder: Builder,
) -> Outcome | None:
    """The outcome to use for layers that share a weight, one for each scheme, or None: they get a ``reason``.

    The candidates are tried from the most exact one on; a less exact one must be measured to be faster than the best
    so far, or with ``goal="memory"`` be smaller.

    Args:
        make: builds the replacement of an outcome.
        x: inputs (T, K) on which errors are measured; None: random ones.
        builder: measures speeds, and has the options.
    """
    first = twins[0]
    candidates = sorted(_candidates(first, outcomes, make, x), key=lambda one: one.error)
    best: _Candidate | None = None
    judged: dict[str, _Judged] = {}
    for one in candidates:
        judged[one.name] = _judge(first, one, best, builder)
        if judged[one.name].why is None:
            if best is not None:
                better = "smaller" if builder.options.goal == "memory" else "faster"
                judged[best.name] = judged[best.name]._replace(why=f"{one.name} is {better}")
            best = one
    tried = tuple(Tried(one.name, one.error, judged[one.name].speed, judged[one.name].why) for one in candidates)
    for layer in twins:
        layer.tried = tried
        if best is None:
            layer.reason = "; ".join(f"not {one.scheme}: {one.why}" for one in tried)
            timed = [one for one in candidates if judged[one.name].speed is not None]
            layer.speeds = builder.speeds(first, first.site.module, timed[0].new) if timed else {}
    return None if best is None else best.outcome


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
    wanted = dense(x)
    found = []
    for outcome in outcomes:
        new = make(layer, outcome)
        error = relative_error(new(x), wanted)
        found.append(_Candidate(outcome, new, error if math.isfinite(error) else math.inf))
    return found


def _judge(layer: Layer, one: _Candidate, best: _Candidate | None, builder: Builder) -> _Judged:
    options = builder.options
    if not one.error <= options.max_error:
        return _Judged(f"its error is above max_error={options.max_error:g}")
    kernels = builder.kernels(one.new)
    if isinstance(kernels, str):
        return _Judged(kernels)
    if options.goal == "memory":
        if best is not None and one.new.nbytes >= best.new.nbytes:
            return _Judged(f"not smaller than {best.name}")
        return _Judged(None)
    over_dense = _speed(layer, layer.site.module, one.new, builder)
    if not builder.keeps(over_dense):
        return _Judged(f"{over_dense.verdict} against dense", over_dense)
    if best is None:
        return _Judged(None, over_dense)
    over_best = _speed(layer, best.new, one.new, builder)
    why = None if over_best.is_faster else f"{over_best.verdict} against {best.name}, {over_best}"
    return _Judged(why, over_dense)


def _speed(layer: Layer, old: nn.Module, new: QuantizedModule, builder: Builder) -> Speed:
    return mean_speed(list(builder.speeds(layer, old, new).values()))
