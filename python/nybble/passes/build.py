"""Build the replacement of each layer and decide whether to keep it: it needs a kernel and, by default, to be faster."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence

from torch import nn

from ..compiled.rounding import sqnr_db
from ..model.eligible import ALREADY, dense_weight, is_linear_like
from ..nn.kinds import find_composite, settings_of
from ..nn.module import QuantizedModule
from ..report.data import NOT_TIMED
from ..report.speed import Speed, mean_speed
from ..weights.sparsity import Block
from .measure import Speeds, Timer
from .plan import Layer, Plan

# For each goal that is timed, whether a replacement of this speed is used.
_KEEPS: dict[str, Callable[[Speed], bool]] = {
    "speed": lambda mean: mean.is_faster,
    "no_slower": lambda mean: not mean.is_slower,
}


def check_model(model: nn.Module) -> None:
    """Raise TypeError or ValueError unless ``model`` is a module whose inner layers can be swapped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}: must be a torch.nn.Module")
    if is_linear_like(model) or find_composite(model) is not None:
        raise ValueError(
            f"model={type(model).__name__}: is itself a layer and cannot be swapped in place; "
            "pass a module that contains it, such as torch.nn.Sequential(model)"
        )


def check_strict(plan: Plan) -> None:
    """Raise ValueError, for ``strict=True``, if a requested layer would not be replaced. Names each and the reason."""
    left = [layer for layer in plan.layers if layer.asked and layer.reason not in (None, ALREADY)]
    if left:
        names = "; ".join(f"{layer.site.name}: {layer.reason}" for layer in left)
        raise ValueError(f"strict=True: {len(left)} of {len(plan.layers)} layers would be left alone: {names}")


class Builder:
    """Builds replacements and rejects those that have no kernel or, depending on the goal, are not faster than dense.

    Twins, layers that share one weight, are built on one packed weight and accepted or rejected together.

    Attributes:
        tell: gets a line before each measurement of speed.
        timer: measures the speeds.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self.options = plan, plan.options
        self._refused: dict[object, Layer] = {}
        self._timed: set[object] = set()
        self.tell: Callable[[str], None] = lambda line: None
        # By a weak reference: in a cycle, the dense layers of the plan would live until a garbage collection.
        me = weakref.ref(self)
        self.timer = Timer(plan.options.timing_s, lambda line: _tell(me(), line))

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
        first = twins[0]
        if first.new is not None:
            # Now, since the dense weight may be freed when the layer is replaced.
            first.sqnr_db = sqnr_db(dense_weight(first.site.module), first.new.quantized(), first.new.scheme)

    def kernels(self, new: QuantizedModule) -> dict[int, str] | str:
        """The kernel of a replacement for each M, or why there is none."""
        found = {}
        for m in self.options.m:
            choice = new.explain(m)
            if choice.kernel is None:
                return f"no kernel runs it at M={m}: {'; '.join(choice.reasons())}"
            found[m] = choice.kernel
        return found

    def speeds(self, layer: Layer, old: nn.Module, new: QuantizedModule) -> Speeds:
        """Time of ``old`` over that of ``new``, in the place of ``layer``, for each M; empty if the time is spent."""
        return self.timer.speeds(old, new, self.options.m, self._left(layer))

    def accepts(self, layer: Layer, new: QuantizedModule) -> bool:
        """Whether a replacement has kernels and, depending on the goal, is fast enough."""
        if isinstance(self.kernels(new), str):
            return False
        if self.options.goal not in _KEEPS:
            return True
        speeds = self.speeds(layer, layer.site.module, new)
        return bool(speeds) and self.keeps(layer, mean_speed(list(speeds.values())))

    def keeps(self, layer: Layer, mean: Speed) -> bool:
        """Whether the goal allows a replacement of this speed. A table of embeddings saves memory: it must not be slower."""
        return _KEEPS[self.options.goal if layer.multiplies else "no_slower"](mean)

    def _why_drop(self, layer: Layer, new: QuantizedModule) -> str | None:
        """Record kernels and speed of a replacement. Returns why it must not be used, or None."""
        kernels = self.kernels(new)
        if isinstance(kernels, str):
            return kernels
        layer.kernels = kernels
        # Reading some rows takes no time beside a product with all of them.
        is_read = layer.tied_to is not None and not layer.multiplies and layer.tied_to.multiplies
        if self.options.goal not in _KEEPS or is_read:
            return None
        layer.speeds = self.speeds(layer, layer.site.module, new)
        if not layer.speeds:
            return NOT_TIMED
        mean = mean_speed(list(layer.speeds.values()))
        if self.keeps(layer, mean):
            return None
        of = f"geometric mean over M={', '.join(map(str, self.options.m))}; {mean.pairs} pairs"
        return f"{mean.verdict} here: {mean} dense speed ({of})" + self._where_it_pays(layer, new)

    def _left(self, layer: Layer) -> int:
        """How many measurements may come, this one included: one for each scheme."""
        self._timed.add(_problem(layer))
        kinds = 1 + len({_problem(other) for other in self._plan.open_layers() if other.new is None} - self._timed)
        return kinds * len(self.options.schemes)

    def _where_it_pays(self, layer: Layer, new: QuantizedModule) -> str:
        """For a sparse layer that is slower than dense: the share of zeros from which it would be faster."""
        if new.scheme.sparsity is None or isinstance(new.scheme.sparsity, Block):
            return ""
        percent = self.timer.pays_from(layer.site.module, new, self.options.m, self._left(layer))
        if percent is None:
            return ""
        return f"; faster from {percent} % zeros" if percent < math.inf else "; not faster even with 95 % zeros"

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
                layer.reason, layer.kernels, layer.speeds = culprit.reason, culprit.kernels, culprit.speeds


def _tell(builder: Builder | None, line: str) -> None:
    if builder is not None:
        builder.tell(line)


def _tied(layer: Layer, first: Layer) -> QuantizedModule:
    """A replacement that uses the packed weight of its twin ``first``."""
    assert first.new is not None, "the first twin is built first"  # noqa: S101
    n, k = dense_weight(layer.site.module).shape
    scheme = layer.kind.scheme_of(first.new.scheme)
    new = layer.kind.module_for(scheme).on_meta(n, k, scheme, layer.weight.dtype)
    new.tie_to(first.new)
    new.adopt(layer.site.module).bias = layer.bias
    layer.tied_to = first
    return new


def _problem(layer: Layer) -> object:
    """The key of layers that run the same kernels at the same speed."""
    return settings_of(layer.site.module), layer.weight.shape, layer.weight.dtype, layer.bias is not None, layer.pattern
