"""The pruning pass over the layers of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from ...compiled.rounding import quantize_weight
from ...model.batches import model_calls
from ...model.eligible import dense_weight
from ...model.inputs import Inputs
from ...model.stages import Stage
from ...model.walk import Edits
from ...nn.module import QuantizedModule
from ...report.data import Pruned
from ...weights.scheme import Scheme
from ...weights.sparsity import Pattern, Unstructured
from ..layerwise.errors import Errors
from ..layerwise.outcome import Outcome
from ..layerwise.work import Work
from ..plan import Layer, Plan
from .allocate import allocate, grid, output_harm
from .permuter import Names, Permuter
from .recognize import recognize, satisfies
from .weight import Task, prune_weight


def sparse_scheme(scheme: Scheme, pattern: Pattern) -> Scheme:
    """The scheme with this pattern of zeros. Raises ValueError if nybble does not define the combination."""
    return replace(scheme, sparsity=pattern.sparsity)


class Asked(NamedTuple):
    """The options of pruning.

    pattern: the pattern of each layer; None: the one that its weight has already. per_layer: whether each layer gets its
    own percentage of zeros. chains: the argument of ``Permuter.permute``.
    """

    pattern: Pattern | None
    per_layer: bool
    chains: bool | tuple[Names, ...]


class Pruning(Work):
    """Prunes the layers of a plan and replaces them by sparse ones.

    Args:
        plan: the layers and the options; its layers get ``pattern``, ``pruned`` and ``new``, or a ``reason``.
        edits: records every change of the model.
        asked: the options of pruning.
    """

    without_data = "magnitude"

    def __init__(self, plan: Plan, edits: Edits, asked: Asked) -> None:
        for layer in plan.open_layers():
            _set_pattern(plan.options.scheme, layer, asked.pattern)
        super().__init__(plan, edits)
        self._wanted = asked
        self.hessian = self.follow_dense = self.asked.method == "sparsegpt"

        if (
            self.needs_data is None
            and self.asked.method != "magnitude"
            and not all(twins[0].is_sparse for twins in self.sets)
        ):
            self.needs_data = f"method={self.asked.method!r}: needs calibration data"

    @property
    def title(self) -> str:
        """As Work.title."""
        return f"{self._wanted.pattern or 'auto'} {self.asked.scheme or 'floats'}"

    def begin(self, model: nn.Module, batches: Sequence[Any] | None) -> None:
        """Permute channels and choose each layer's percentage, if requested."""
        if self._wanted.chains:
            first = None if batches is None else model_calls(model, batches[:1])[0][0]
            Permuter(self.plan, self.edits, first).permute(self._wanted.chains)
            if self.ranks is not None:
                told = [layer.site.name for layer in self.plan.layers if layer.permutation_gain is not None]
                self.ranks.agree("layers with permuted inputs", ", ".join(told))
        if self._wanted.per_layer:
            self._share(model, batches)

    def _share(self, model: nn.Module, batches: Sequence[Any] | None) -> None:
        """Choose the percentage of zeros of each layer that is not pruned yet, by its output error."""
        todo = {twins[0].site.name: twins for twins in self.sets if not twins[0].is_sparse}
        if not todo:
            return
        sites = tuple(twins[0].site for twins in todo.values())
        found = self.inputs(Stage("all", sites, *model_calls(model, batches)), hessian=False) if batches else {}
        percent = self._percent(next(iter(todo.values()))[0])
        harms, sizes = {}, {}
        for name, twins in todo.items():
            weight = dense_weight(twins[0].site.module)
            harms[name] = output_harm(weight, found.get(id(twins[0].site.module)), grid(percent))
            sizes[name] = weight.numel()
        for name, own in allocate(harms, sizes, percent).items():
            for layer in todo[name]:
                layer.pattern = Pattern(Unstructured(own), own / 100)

    def solve(self, layer: Layer, scheme: Scheme | None, inputs: Inputs | None) -> Outcome:
        """As Work.solve."""
        if layer.is_sparse:
            return Outcome(dense_weight(layer.site.module), "unchanged")
        return prune_weight(dense_weight(layer.site.module), self._task(layer), inputs)

    def make(self, layer: Layer, outcome: Outcome) -> QuantizedModule:
        """As Work.make."""
        assert self.asked.scheme is not None, "only called with a scheme"  # noqa: S101
        assert layer.pattern is not None, "layers that are replaced have a pattern"  # noqa: S101
        assert outcome.weight is not None, "pruning always gives a float weight"  # noqa: S101
        scheme = sparse_scheme(self.asked.scheme if outcome.act else self.asked.scheme.dynamic, layer.pattern)
        quantized = outcome.quantized or quantize_weight(outcome.weight, scheme)
        in_features, dtype = outcome.weight.shape[1], layer.weight.dtype
        module = layer.kind.module_for(scheme)
        new = module.from_quantized(quantized, in_features, layer.bias, scheme, dtype, outcome.act)
        return new.adopt(layer.site.module)

    def is_kept(self, layer: Layer) -> bool:
        """As Work.is_kept."""
        return layer.is_sparse

    def note(self, layer: Layer, outcome: Outcome, errors: Errors) -> None:
        """As Work.note."""
        assert outcome.weight is not None, "pruning always gives a float weight"  # noqa: S101
        layer.pruned = Pruned(
            pattern=str(layer.pattern),
            kept=outcome.weight.count_nonzero().item() / outcome.weight.numel(),
            method=outcome.method,
            error_dense=errors.rounding,
            error=errors.new,
            permutation_gain=layer.permutation_gain,
            notes=(*outcome.notes, *layer.notes),
        )

    def _task(self, layer: Layer) -> Task:
        assert layer.pattern is not None, "layers that are replaced have a pattern"  # noqa: S101
        return Task(layer.pattern, self.asked.method, self.asked.scheme)

    def _percent(self, layer: Layer) -> int:
        form = self._task(layer).pattern.sparsity
        assert isinstance(form, Unstructured), "sparsify checks per_layer"  # noqa: S101
        return form.percent


def _set_pattern(scheme: Scheme | None, layer: Layer, pattern: Pattern | None) -> None:
    weight = dense_weight(layer.site.module)
    layer.pattern = recognize(weight) if pattern is None else pattern
    if layer.pattern is None:
        layer.reason = "its weight has none of the supported sparsity patterns"
        return
    layer.is_sparse = pattern is None or satisfies(weight, layer.pattern)
    try:
        if scheme is not None:
            layer.kind.module_for(sparse_scheme(scheme, layer.pattern))
    except ValueError as error:
        layer.reason = str(error)
