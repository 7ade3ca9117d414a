"""Build the replacement of each layer and decide whether to keep it: it needs a kernel and, by default, a speedup."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ..model.eligible import ALREADY, dense_weight, is_linear_like
from ..model.options import Options
from ..nn.module import QuantizedModule
from ..report.data import geometric_mean
from ..weights.sparsity import Block
from . import measure
from .plan import Layer, Plan


def check_model(model: nn.Module) -> None:
    """Raise TypeError or ValueError unless ``model`` is a module whose inner layers can be swapped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}: must be a torch.nn.Module")
    if is_linear_like(model):
        raise ValueError(
            f"model={type(model).__name__}: is itself a Linear layer and cannot be swapped in place; "
            "pass a module that contains it, such as torch.nn.Sequential(model)"
        )


def check_strict(plan: Plan) -> None:
    """Raise ValueError, for ``strict=True``, if a requested layer would not be replaced. Names each and the reason."""
    left = [layer for layer in plan.layers if layer.asked and layer.reason not in (None, ALREADY)]
    if left:
        names = "; ".join(f"{layer.site.name}: {layer.reason}" for layer in left)
        raise ValueError(f"strict=True: {len(left)} of {len(plan.layers)} layers would be left alone: {names}")


class Builder:
    """Builds replacements and rejects those that have no kernel or are slower than the dense layer.

    Twins, layers that share one weight, are built on one packed weight and accepted or rejected together.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._refused: dict[object, Layer] = {}

    def is_refused(self, twins: Sequence[Layer]) -> bool:
        """Whether a layer with the same shape, dtype and bias as one of these was built before and rejected."""
        return any(_problem(layer) in self._refused for layer in twins)

    def build(self, twins: Sequence[Layer], make: Callable[[Layer], QuantizedModule]) -> None:
        """Set ``new`` of every twin, or ``reason`` if it is rejected; ``make`` builds the replacement of the first."""
        if not self.is_refused(twins):
            for layer in twins:
                layer.new = make(layer) if layer is twins[0] else _tied(layer, twins[0])
                layer.new.train(layer.site.module.training)
                layer.reason = self._why_drop(layer, layer.new)
                if layer.reason is not None:
                    self._refused[_problem(layer)] = layer
        self.leave_refused(twins)

    def _why_drop(self, layer: Layer, new: QuantizedModule) -> str | None:
        """Record kernels and speedup of a replacement. Returns why it must not be used, or None."""
        asked = self._options
        for m in asked.m:
            choice = new.explain(m)
            if choice.kernel is None:
                return f"no kernel runs it at M={m}: {'; '.join(choice.reasons())}"
            layer.kernels[m] = choice.kernel
        if asked.goal == "speed":
            layer.speedup = measure.speedups(layer.site.module, new, layer.kernels)
            mean = geometric_mean(tuple(layer.speedup.values()))
            if mean <= 1:
                slower = f"slower here: {mean:.2f}x dense speed (geometric mean over M={', '.join(map(str, asked.m))})"
                return slower + self._where_it_pays(layer, new)
        return None

    def _where_it_pays(self, layer: Layer, new: QuantizedModule) -> str:
        """For a sparse layer that is slower than dense: the share of zeros from which it would be faster."""
        if new.scheme.sparsity is None or isinstance(new.scheme.sparsity, Block):
            return ""
        percent = measure.pays_from(layer.site.module, new, self._options.m)
        if percent is None:
            return "; slower even with 95 % zeros"
        return f"; faster from {percent} % zeros"

    def leave_refused(self, twins: Sequence[Layer]) -> None:
        """Mark these twins as left alone if a layer with the shape of one of them was rejected before."""
        culprits = {layer.site.name: self._refused.get(_problem(layer)) for layer in twins}
        if not any(culprits.values()):
            return
        name = next(name for name, culprit in culprits.items() if culprit)
        for layer in twins:
            culprit = culprits[layer.site.name]
            layer.new = layer.tied_to = None
            if culprit is None:
                layer.reason = f"shares its weight with {name}, which is left alone"
            else:
                layer.reason, layer.kernels, layer.speedup = culprit.reason, culprit.kernels, culprit.speedup


def _tied(layer: Layer, first: Layer) -> QuantizedModule:
    """A replacement that uses the packed weight of its twin ``first``."""
    assert first.new is not None, "the first twin is built first"  # noqa: S101
    n, k = dense_weight(layer.site.module).shape
    new = type(first.new).on_meta(n, k, first.new.scheme, layer.weight.dtype)
    new.tie_to(first.new)
    new.bias = layer.bias
    layer.tied_to = first
    return new


def _problem(layer: Layer) -> object:
    """The key of layers that run the same kernels at the same speed."""
    kind = type(layer.site.module)
    return kind, layer.weight.shape, layer.weight.dtype, layer.bias is not None, layer.pattern
