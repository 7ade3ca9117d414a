"""Prune the layers of a plan, stage by stage, and put each result into the model before the next is looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...nn import Linear, SparseLinear
from ...report import Pruned
from ...scheme import Scheme
from ...sparsity import Pattern, Unstructured
from ..build import Builder
from ..eligible import dense_weight, is_conv1d
from ..plan import Layer, Plan
from ..walk import Edits
from .bar import bar
from .inputs import Inputs
from .judge import Errors, dense_like, judge
from .recognize import recognize, satisfies
from .shares import grid, harm, spread
from .stages import Stage, stages, whole
from .store import Done, Store
from .weight import Outcome, Task, prune_weight


def sparse_scheme(scheme: Scheme, pattern: Pattern) -> Scheme:
    """The scheme of sparse weights with these numbers. Raises ValueError where nybble does not define it."""
    return replace(scheme, sparsity=pattern.sparsity)


class Work:
    """The layers of a plan on their way to sparse ones.

    Args:
        plan: what was found and asked for; its layers get ``pattern``, ``pruned`` and ``new``, or a ``reason``.
        pattern: what each is to become, or None: what it is already.
        edits: takes every change of the model.
    """

    def __init__(self, plan: Plan, pattern: Pattern | None, edits: Edits) -> None:
        self._plan, self._asked, self._edits = plan, plan.options, edits
        self._builder = Builder(plan.options)
        for layer in plan.open_layers():
            self._set_pattern(layer, pattern)
        self._sets = plan.twins()

    @property
    def needs_data(self) -> bool:
        """Whether some layer is yet to be pruned by a method that looks at inputs."""
        return self._asked.method != "magnitude" and not all(twins[0].is_sparse for twins in self._sets)

    def _set_pattern(self, layer: Layer, pattern: Pattern | None) -> None:
        weight = dense_weight(layer.site.module)
        layer.pattern = recognize(weight) if pattern is None else pattern
        if layer.pattern is None:
            layer.reason = "its weight has no pattern of zeros"
            return
        layer.is_sparse = pattern is None or satisfies(weight, layer.pattern)
        try:
            if self._asked.scheme is not None:
                sparse_scheme(self._asked.scheme, layer.pattern)
        except ValueError as error:
            layer.reason = str(error)

    def share(self, model: nn.Module, batches: Sequence[Any] | None) -> None:
        """Give the layers that are yet to be pruned their own percents, by what each of them suffers."""
        todo = {twins[0].site.name: twins for twins in self._sets if not twins[0].is_sparse}
        if not todo:
            return
        modules = [twins[0].site.module for twins in todo.values()]
        found = Stage("all", tuple(modules), *whole(model, batches)).inputs(hessian=False) if batches else {}
        percent = self._percent(next(iter(todo.values()))[0])
        harms, sizes = {}, {}
        for name, twins in todo.items():
            weight = dense_weight(twins[0].site.module)
            harms[name] = harm(weight, found.get(id(twins[0].site.module)), grid(percent))
            sizes[name] = weight.numel()
        for name, own in spread(harms, sizes, percent).items():
            for layer in todo[name]:
                layer.pattern = Pattern(Unstructured(own), own / 100)

    def run(self, model: nn.Module, batches: Sequence[Any] | None, store: Store | None, progress: bool) -> None:
        """Prune all layers, on the batches where there are some; those in the store are as they were left there."""
        sets, method = list(self._sets), self._asked.method
        modules = [layer.site.module for twins in sets for layer in twins]
        with bar(len(sets), progress) as advance:
            for stage in stages(model, batches, modules, follow_dense=method == "sparsegpt"):
                here = set(stage.layers)
                now = [twins for twins in sets if any(layer.site.module in here for layer in twins)]
                sets = [twins for twins in sets if twins not in now]
                done = {twins[0].site.name: self._load(twins[0], store) for twins in now}
                inputs = stage.inputs(method == "sparsegpt") if not all(done.values()) else {}
                for twins in now:
                    name = twins[0].site.name
                    # Twins of one stage: the one that sees the most stands for all.
                    seen = [inputs[id(layer.site.module)] for layer in twins if id(layer.site.module) in inputs]
                    self._prune(twins, max(seen, key=lambda one: one.rows, default=None), done[name], store)
                    advance(name)

    def finish(self) -> None:
        """Give the new layers the mode of those that they replace."""
        for layer in self._plan.layers:
            if layer.new is not None:
                layer.new.train(layer.site.module.training)

    def _task(self, layer: Layer) -> Task:
        assert layer.pattern is not None, "open layers have one"  # noqa: S101
        return Task(layer.pattern, self._asked.method, self._asked.scheme)

    def _percent(self, layer: Layer) -> int:
        form = self._task(layer).pattern.sparsity
        assert isinstance(form, Unstructured), "checked before"  # noqa: S101
        return form.percent

    def _load(self, layer: Layer, store: Store | None) -> Done | None:
        if store is None or layer.is_sparse:
            return None
        return store.load(layer.site.name, dense_weight(layer.site.module), self._task(layer))

    def _prune(self, twins: Sequence[Layer], inputs: Inputs | None, done: Done | None, store: Store | None) -> None:
        first = twins[0]
        weight = dense_weight(first.site.module)
        if done is not None:
            outcome = done.outcome
        elif first.is_sparse or self._builder.is_refused(twins):
            outcome = Outcome(weight, "as it was")
        else:
            outcome = prune_weight(weight, self._task(first), inputs)
        errors = self._build(twins, outcome, None if inputs is None else inputs.held_out)
        if first.reason is not None:
            return
        if done is not None:
            errors = done.errors
        elif store is not None and not first.is_sparse:
            store.save(first.site.name, Done(outcome, errors))
        for layer in twins:
            layer.pruned = Pruned(
                pattern=str(first.pattern),
                kept=(outcome.weight != 0).float().mean().item(),
                method=outcome.method,
                error_dense=errors.rounding,
                error=errors.new,
                permutation_gain=layer.permutation_gain,
                notes=(*outcome.notes, *layer.notes),
            )

    def _build(self, twins: Sequence[Layer], outcome: Outcome, x: Tensor | None) -> Errors:
        """Make what stands for the twins from now on, judge it by inputs x (T, K), and place it."""
        dense = twins[0].site.module
        if self._asked.scheme is None:
            new: nn.Module | None = dense_like(dense, outcome.weight)
        else:
            self._builder.build(twins, lambda layer: self._sparse(layer, outcome))
            new = twins[0].new
        if new is None:
            return Errors()
        errors = judge(dense, new, self._asked.scheme, x)
        if errors.new is not None and not math.isfinite(errors.new):
            for layer in twins:
                layer.new, layer.reason = None, "its output is not finite once it is pruned"
        for layer in twins:
            if layer.new is not None:
                self._edits.swap(layer.site, layer.new)
            elif layer.reason is None:
                self._place_weight(layer, outcome.weight)
        return errors

    def _sparse(self, layer: Layer, outcome: Outcome) -> Linear:
        assert self._asked.scheme is not None, "asked above"  # noqa: S101
        assert layer.pattern is not None, "open layers have one"  # noqa: S101
        scheme = sparse_scheme(self._asked.scheme, layer.pattern)
        if outcome.quantized is None:
            return SparseLinear.from_weight(outcome.weight, layer.bias, scheme)
        in_features = dense_weight(layer.site.module).shape[1]
        return SparseLinear.from_quantized(outcome.quantized, in_features, layer.bias, scheme, layer.weight.dtype)

    def _place_weight(self, layer: Layer, weight: Tensor) -> None:
        old, module = layer.weight, layer.site.module
        held = weight.T.contiguous() if is_conv1d(module) else weight
        new = nn.Parameter(held, requires_grad=old.requires_grad)
        self._plan.renew(old, new)
        self._edits.put(module._parameters, "weight", new)
