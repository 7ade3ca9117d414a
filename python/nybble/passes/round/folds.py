"""Fold per-channel input scales into the layer that produces the inputs, so that they cost nothing at run time.

Scales can be folded into a norm if only Linear layers read it, and into a Linear layer if everything between it and the
consumer is linear per channel: the value projection into the output projection, the up projection of a gated MLP into
the down projection. Legal folds are found by trial, not by names or types: each producer and consumer with matching
shapes is tried with scales that are powers of two. These cause no rounding, so the block's output stays the same, up to
the order of summation, exactly if the fold is legal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...model.digest import data_sha256
from ...model.eligible import dense_weight, is_linear_like
from ...model.stages import Stage
from ...model.walk import Edits
from ...nn.kinds import find_kind
from ..layerwise.errors import float_tensors, output_change
from ..plan import Layer, Plan

# The largest relative change of the output for a legal fold, which only changes the order of summation.
_TOLERANCE = 1e-6
# Sizes of attention heads that are tried for grouped-query attention, where query heads share a value head.
_HEADS = (256, 128, 96, 80, 64, 48, 40, 32, 16, 8)


@dataclass(frozen=True)
class Fold:
    """A place where a scale can be folded.

    producer: a norm or Linear layer whose outputs are divided. consumers: the layers whose inputs these are. one_plus:
    whether the producer is a norm that multiplies by 1 + weight. index: the producer's channel for each of the
    consumers' input channels (K,), or None if they are the same.
    """

    producer: nn.Module
    consumers: tuple[Layer, ...]
    one_plus: bool = False
    index: Tensor | None = None

    @property
    def told(self) -> str:
        """The consumers and the form of the fold, to compare it with others."""
        index = None if self.index is None else data_sha256([self.index])
        return f"{[layer.site.name for layer in self.consumers]}, {self.one_plus}, {index}"

    def tie(self, scale: Tensor) -> Tensor:
        """The scale (K,) with equal values where a producer channel feeds several inputs: their geometric mean."""
        if self.index is None:
            return scale
        logs = torch.zeros(int(self.index.max()) + 1, dtype=torch.float64)
        counts = torch.bincount(self.index)
        return (logs.index_add(0, self.index, scale.double().log()) / counts)[self.index].exp().to(scale.dtype)

    def apply(self, scale: Tensor, plan: Plan, edits: Edits) -> None:
        """Divide the producer's outputs by a positive, tied scale (K,) and multiply the consumers' weights by it."""
        own = scale if self.index is None else torch.empty(int(self.index.max()) + 1).index_copy(0, self.index, scale)
        for key, parameter in self.producer._parameters.items():
            if parameter is not None:
                _put(self.producer, key, self._divided(key, parameter.detach().float(), own.float()), plan, edits)
        for layer in self.consumers:
            weight, held = layer.kind.weight, layer.weight
            scaled = weight.to_matrix(held.detach().float()) * scale.float()
            _put(layer.site.module, weight.key, weight.from_matrix(scaled, held.shape), plan, edits)

    def _divided(self, key: str, value: Tensor, scale: Tensor) -> Tensor:
        kind = find_kind(self.producer)
        if kind is not None and key == kind.weight.key:
            return kind.weight.from_matrix(kind.weight.to_matrix(value) / scale[:, None], value.shape)
        return (1 + value) / scale - 1 if self.one_plus and key == "weight" else value / scale


def _put(module: nn.Module, key: str, value: Tensor, plan: Plan, edits: Edits) -> None:
    old = module._parameters[key]
    assert old is not None, "checked by the caller"  # noqa: S101
    new = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
    plan.replace_parameter(old, new)
    edits.put(module._parameters, key, new)


def find_folds(stage: Stage, layers: Sequence[Layer], plan: Plan) -> list[Fold]:
    """The legal folds of a stage that has runs. Each layer is a consumer, and each module a producer, of at most one."""
    own = [layer for layer in layers if _owns_parameters(layer, plan)]
    seen = _watch(stage.runs[0], own, plan)
    found: list[Fold] = []
    for fold in _candidates(seen, own):
        consumers = {id(layer) for one in found for layer in one.consumers}
        producers = {id(one.producer) for one in found}
        if (
            consumers.isdisjoint(map(id, fold.consumers))
            and id(fold.producer) not in producers
            and _is_legal(fold, stage, seen, plan)
        ):
            found.append(fold)
    return found


def try_fold(fold: Fold, scale: Tensor, plan: Plan, edits: Edits) -> bool:
    """Apply a fold, unless a changed weight overflows its dtype. Returns whether it was applied."""
    trial = Edits()
    try:
        fold.apply(scale, plan, trial)
        changed = [*fold.producer._parameters.values(), *(layer.weight for layer in fold.consumers)]
        is_finite = all(one is None or bool(torch.isfinite(one).all()) for one in changed)
    except BaseException:
        trial.undo()
        raise
    if is_finite:
        edits.take(trial)
    else:
        trial.undo()
    return is_finite


@dataclass
class _Seen:
    """What one run shows: its output, the layers in the order of their calls, and the layers that read each norm."""

    output: list[Tensor] = field(default_factory=list)
    order: list[Layer] = field(default_factory=list)
    readers: dict[nn.Module, list[Layer]] = field(default_factory=dict)


def _watch(run: Callable[[], Any], layers: Sequence[Layer], plan: Plan) -> _Seen:
    seen = _Seen()
    outputs: dict[int, tuple[nn.Module, Any]] = {}

    def make(module: nn.Module, _: Any, output: Any) -> None:
        outputs[id(output)] = (module, output)  # keeps the output alive, so that no other tensor gets its id

    with contextlib.ExitStack() as hooks:
        for site in plan.sites:
            if _is_norm(site.module, plan):
                hooks.callback(site.module.register_forward_hook(make).remove)
        for layer in layers:

            def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: Layer = layer) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                seen.order.append(layer)
                if id(x) in outputs:
                    seen.readers.setdefault(outputs[id(x)][0], []).append(layer)

            hooks.callback(layer.site.module.register_forward_pre_hook(read, with_kwargs=True).remove)
        seen.output = float_tensors(run())
    return seen


def _candidates(seen: _Seen, layers: Sequence[Layer]) -> Iterator[Fold]:
    for norm, readers in seen.readers.items():
        for one_plus in (False, True):
            yield Fold(norm, tuple(readers), one_plus)
    for i, consumer in enumerate(seen.order):
        k = dense_weight(consumer.site.module).shape[1]
        for producer in reversed(seen.order[:i]):
            n = dense_weight(producer.site.module).shape[0]
            if n == k:
                yield Fold(producer.site.module, (consumer,))
            elif k % n == 0:
                for head in (size for size in dict.fromkeys((n, *_HEADS)) if n % size == 0):
                    channels = torch.arange(n).view(-1, 1, head).expand(-1, k // n, -1)
                    yield Fold(producer.site.module, (consumer,), index=channels.reshape(-1))


def _is_legal(fold: Fold, stage: Stage, seen: _Seen, plan: Plan) -> bool:
    k = dense_weight(fold.consumers[0].site.module).shape[1]
    signs = torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    trial = Edits()
    try:
        fold.apply(fold.tie(2.0**signs) if fold.index is None else (2.0**signs)[fold.index], plan, trial)
        return output_change(float_tensors(stage.runs[0]()), seen.output) <= _TOLERANCE
    finally:
        trial.undo()


def _owns_parameters(layer: Layer, plan: Plan) -> bool:
    """Whether nothing else uses the parameters of a layer, so that they may be changed."""
    return len(layer.site.places) == 1 and all(
        len(plan.owners[plan.group(one)]) == 1 for one in layer.site.module._parameters.values() if one is not None
    )


def _is_norm(module: nn.Module, plan: Plan) -> bool:
    """Whether a module looks like a norm: its only parameters are a per-channel weight and perhaps a per-channel bias."""
    held = {key: value for key, value in module._parameters.items() if value is not None}
    return (
        not is_linear_like(module)
        and not module._modules
        and "weight" in held
        and held.keys() <= {"weight", "bias"}
        and all(value.dim() == 1 and len(plan.owners[plan.group(value)]) == 1 for value in held.values())
    )
