"""The quantization pass over the layers of a plan."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...model.eligible import dense_weight
from ...model.inputs import Inputs
from ...model.stages import Stage
from ...model.walk import Edits
from ...nn.module import QuantizedModule
from ...report.data import Rounded
from ...weights.scheme import Scheme
from ..layerwise.errors import Errors
from ..layerwise.outcome import Outcome
from ..layerwise.store import Entry, Store
from ..layerwise.work import Sets, Work
from ..plan import Layer, Plan
from .folds import Fold, find_folds, try_fold
from .methods import NEEDS_DATA, round_weight
from .scales import Awq, Smooth, choose


class Rounding(Work):
    """Quantizes the layers of a plan, which get ``rounded`` and ``new``, or a ``reason``.

    scaling: the method that finds input scales to fold into preceding layers, or None.
    """

    def __init__(self, plan: Plan, edits: Edits, scaling: Awq | Smooth | None) -> None:
        super().__init__(plan, edits)
        self._scaling = scaling
        self._last: tuple[object, Outcome] | None = None
        method = self.asked.method
        self.hessian, self.follow_dense = method in NEEDS_DATA, method == "gptq"
        if self.needs_data is None and self.sets and (self.hessian or scaling is not None):
            self.needs_data = (
                f"method={method!r}: needs calibration data" if self.hessian else "smooth: needs calibration data"
            )

    def prepare(self, stage: Stage, sets: Sets, inputs: dict[int, Inputs], store: Store | None) -> None:
        """Find input scales and fold them into the layers that produce the inputs."""
        layers = [twins[0] for twins in sets if len(twins) == 1 and twins[0].kind.takes_rows]
        if self._scaling is None or not stage.runs:
            return
        folds = find_folds(stage, layers, self.plan)
        if self.ranks is not None:
            names = {id(site.module): site.name for site in self.plan.sites}
            told = [f"{names[id(one.producer)]}: {one.told}" for one in folds]
            self.ranks.agree(f"layers in {stage.name} that can divide others' inputs", "; ".join(told))
        name = f"scales of {stage.name}"
        specs = {
            str(i): ((dense_weight(one.consumers[0].site.module).shape[1],), torch.float32)
            for i, one in enumerate(folds)
        }
        known = None if store is None else store.load(name, specs)
        scales = {} if known is None else dict(known.tensors)
        for i, fold in enumerate(folds):
            if known is None:
                chosen = choose(self._scaling, fold.consumers, inputs, self.asked.schemes[0], fold.tie, self.ranks)
                if chosen is not None:
                    scales[str(i)] = chosen
            if str(i) in scales and try_fold(fold, scales[str(i)], self.plan, self.edits):
                self._scaled(fold, scales[str(i)], inputs)
        if store is not None and known is None:
            store.save(name, Entry(scales, "scales"))

    def _scaled(self, fold: Fold, scale: Tensor, inputs: dict[int, Inputs]) -> None:
        spread = (scale.max() / scale.min()).item()
        for layer in fold.consumers:
            layer.notes.append(f"inputs scaled per channel, the largest scale {spread:.3g} times the smallest")
            if id(layer.site.module) in inputs:
                inputs[id(layer.site.module)].divide(scale)

    def solve(self, layer: Layer, scheme: Scheme | None, inputs: Inputs | None) -> Outcome:
        """As Work.solve; schemes that differ only in their activations share the codes of a weight."""
        assert scheme is not None, "rounding always gives codes"  # noqa: S101
        key = layer.site.name, scheme.weight_bits, scheme.group_size, scheme.symmetric
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        method, why = self.asked.method, layer.kind.why_no_rows(layer.site.module)
        if method in NEEDS_DATA and why is not None:
            outcome = round_weight(dense_weight(layer.site.module), scheme, "rtn")
            outcome = replace(outcome, notes=(f"rtn instead of {method}: {why}",))
        else:
            outcome = round_weight(dense_weight(layer.site.module), scheme, method, inputs)
        self._last = (key, outcome) if self.asked.others else None
        return outcome

    def make(self, layer: Layer, outcome: Outcome) -> QuantizedModule:
        """As Work.make."""
        assert outcome.quantized is not None, "rounding always gives codes"  # noqa: S101
        assert outcome.scheme is not None, "and a scheme with them"  # noqa: S101
        in_features = dense_weight(layer.site.module).shape[1]
        scheme = outcome.scheme if outcome.act else outcome.scheme.dynamic
        dtype = layer.weight.dtype
        new = layer.kind.module.from_quantized(outcome.quantized, in_features, layer.bias, scheme, dtype, outcome.act)
        return new.adopt(layer.site.module)

    def note(self, layer: Layer, outcome: Outcome, errors: Errors) -> None:
        """As Work.note."""
        layer.rounded = Rounded(outcome.method, errors.rounding, errors.new, (*outcome.notes, *layer.notes))
