"""Where inputs of layers may be divided by a scale: what makes them takes the division, so that nothing runs for it.

A norm can be divided channel by channel if only Linear layers read it, and so can the outputs of a layer if what follows
up to the next layer is linear in them: of values up to the output projection, of the linear branch of a gated MLP. Who
reads what is not guessed from names or types: each pair that fits by its shapes is tried with scales that are powers of
two. Those round nothing, so that the output of the block stays to the last bits where the fold is legal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...model.eligible import dense_weight, is_linear_like
from ...model.stages import Stage
from ...model.walk import Edits
from ...nn.kinds import find_kind
from ..layerwise.judge import moved, tensors_of
from ..plan import Layer, Plan

# How far the output may move by scales that round nothing: another order of summation at the most.
_STILL = 1e-6
# Sizes of an attention head, for values that several query heads share.
_HEADS = (256, 128, 96, 80, 64, 48, 40, 32, 16, 8)


@dataclass(frozen=True)
class Fold:
    """takers: their inputs are divided. maker: a norm or a Linear layer, whose outputs are. one_plus: of a norm that
    multiplies by 1 + weight. index: the maker's channel of each of the takers' (K,), or None where they are the same."""

    maker: nn.Module
    takers: tuple[Layer, ...]
    one_plus: bool = False
    index: Tensor | None = None

    def tie(self, scale: Tensor) -> Tensor:
        """The nearest scale (K,), in the geometric mean, that is one of the maker's channels."""
        if self.index is None:
            return scale
        logs = torch.zeros(int(self.index.max()) + 1, dtype=torch.float64)
        counts = torch.bincount(self.index)
        return (logs.index_add(0, self.index, scale.double().log()) / counts)[self.index].exp().to(scale.dtype)

    def apply(self, scale: Tensor, plan: Plan, edits: Edits) -> None:
        """Divide what the maker puts out by a positive scale (K,), tied, and multiply the takers' weights by it."""
        own = scale if self.index is None else torch.empty(int(self.index.max()) + 1).index_copy(0, self.index, scale)
        for key, parameter in self.maker._parameters.items():
            if parameter is not None:
                _put(self.maker, key, self._divided(key, parameter.detach().float(), own.float()), plan, edits)
        for layer in self.takers:
            weight, held = layer.kind.weight, layer.weight
            scaled = weight.to_matrix(held.detach().float()) * scale.float()
            _put(layer.site.module, weight.key, weight.from_matrix(scaled, held.shape), plan, edits)

    def _divided(self, key: str, value: Tensor, scale: Tensor) -> Tensor:
        kind = find_kind(self.maker)
        if kind is not None and key == kind.weight.key:
            return kind.weight.from_matrix(kind.weight.to_matrix(value) / scale[:, None], value.shape)
        return (1 + value) / scale - 1 if self.one_plus and key == "weight" else value / scale


def _put(module: nn.Module, key: str, value: Tensor, plan: Plan, edits: Edits) -> None:
    old = module._parameters[key]
    assert old is not None, "read before"  # noqa: S101
    new = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
    plan.renew(old, new)
    edits.put(module._parameters, key, new)


def find_folds(stage: Stage, layers: Sequence[Layer], plan: Plan) -> list[Fold]:
    """The legal folds of a stage with data into some of its layers; each layer's inputs are in one at the most."""
    own = [layer for layer in layers if _is_alone(layer, plan)]
    seen = _watch(stage.runs[0], own, plan)
    found: list[Fold] = []
    for fold in _candidates(seen, own):
        taken = {id(layer) for one in found for layer in one.takers}
        makers = {id(one.maker) for one in found}
        if (
            taken.isdisjoint(map(id, fold.takers))
            and id(fold.maker) not in makers
            and _is_legal(fold, stage, seen, plan)
        ):
            found.append(fold)
    return found


def try_fold(fold: Fold, scale: Tensor, plan: Plan, edits: Edits) -> bool:
    """Apply a fold, unless a weight of the model cannot hold what it would become."""
    trial = Edits()
    fold.apply(scale, plan, trial)
    changed = [*fold.maker._parameters.values(), *(layer.weight for layer in fold.takers)]
    if all(one is None or bool(torch.isfinite(one).all()) for one in changed):
        edits.take(trial)
        return True
    trial.undo()
    return False


@dataclass
class _Seen:
    """What one run shows: its output, the layers in the order of their calls, and who reads the output of each norm."""

    output: list[Tensor] = field(default_factory=list)
    order: list[Layer] = field(default_factory=list)
    readers: dict[nn.Module, list[Layer]] = field(default_factory=dict)


def _watch(run: Callable[[], Any], layers: Sequence[Layer], plan: Plan) -> _Seen:
    seen = _Seen()
    outputs: dict[int, tuple[nn.Module, Any]] = {}

    def make(module: nn.Module, _: Any, output: Any) -> None:
        outputs[id(output)] = (module, output)  # held, so that no other tensor gets its id

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
        seen.output = tensors_of(run())
    return seen


def _candidates(seen: _Seen, layers: Sequence[Layer]) -> Iterator[Fold]:
    for norm, takers in seen.readers.items():
        for one_plus in (False, True):
            yield Fold(norm, tuple(takers), one_plus)
    for i, taker in enumerate(seen.order):
        k = dense_weight(taker.site.module).shape[1]
        for maker in reversed(seen.order[:i]):
            n = dense_weight(maker.site.module).shape[0]
            if n == k:
                yield Fold(maker.site.module, (taker,))
            elif k % n == 0:
                for head in (size for size in dict.fromkeys((n, *_HEADS)) if n % size == 0):
                    channels = torch.arange(n).view(-1, 1, head).expand(-1, k // n, -1)
                    yield Fold(maker.site.module, (taker,), index=channels.reshape(-1))


def _is_legal(fold: Fold, stage: Stage, seen: _Seen, plan: Plan) -> bool:
    k = dense_weight(fold.takers[0].site.module).shape[1]
    signs = torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    trial = Edits()
    try:
        fold.apply(fold.tie(2.0**signs) if fold.index is None else (2.0**signs)[fold.index], plan, trial)
        return moved(tensors_of(stage.runs[0]()), seen.output) <= _STILL
    finally:
        trial.undo()


def _is_alone(layer: Layer, plan: Plan) -> bool:
    """Whether nothing else uses the parameters of a layer, so that they may change."""
    return len(layer.site.places) == 1 and all(
        len(plan.owners[plan.group(one)]) == 1 for one in layer.site.module._parameters.values() if one is not None
    )


def _is_norm(module: nn.Module, plan: Plan) -> bool:
    """Whether a module's only parameters are a weight, and perhaps a bias, with a value for each channel."""
    held = {key: value for key, value in module._parameters.items() if value is not None}
    return (
        not is_linear_like(module)
        and not module._modules
        and "weight" in held
        and held.keys() <= {"weight", "bias"}
        and all(value.dim() == 1 and len(plan.owners[plan.group(value)]) == 1 for value in held.values())
    )
