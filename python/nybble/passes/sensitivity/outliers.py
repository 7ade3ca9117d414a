"""Outlier channels: input channels of a layer that are far larger than the others, which makes rounding worse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...model.rows import rows_of
from ...nn.kinds import kind_of

# A channel is an outlier if its maximum is above this many times that of the median channel (LLM.int8() uses about 6).
FACTOR = 6.0


class Outliers(NamedTuple):
    """channels: indices of the outlier channels, the largest first. peak: the largest channel over the median one."""

    channels: tuple[int, ...]
    peak: float


def outliers(largest: Tensor) -> Outliers:
    """The outlier channels, given the largest magnitude of each channel (K,)."""
    middle = largest.median()
    if not middle > 0:
        return Outliers((), float("inf") if largest.max() > 0 else 1.0)
    order = torch.argsort(largest, descending=True)
    found = tuple(int(i) for i in order[: int((largest > FACTOR * middle).sum())])
    return Outliers(found, float(largest.max() / middle))


def largest_inputs(layers: Sequence[nn.Module], run: Callable[[], object]) -> list[Tensor | None]:
    """The largest magnitude of each input channel, float32 (K,), of each layer during ``run``; None if it is not called, or
    has no rows of inputs (an embedding)."""
    found: dict[int, Tensor] = {}

    def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        here = rows_of(layer, x.detach(), None).abs().amax(0).float()
        found[id(layer)] = torch.maximum(found[id(layer)], here) if id(layer) in found else here

    with contextlib.ExitStack() as hooks:
        for layer in (one for one in layers if kind_of(one).why_no_rows(one) is None):
            hooks.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
        run()
    return [found.get(id(layer)) for layer in layers]
