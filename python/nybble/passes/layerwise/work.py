"""The loop over stages and layers that quantization and pruning share; each replacement goes into the model at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...model.bar import bar
from ...model.eligible import dense_weight, why_left
from ...model.inputs import Inputs
from ...model.stages import Stage, stages
from ...model.walk import Edits
from ...nn.module import QuantizedModule
from ...parallel.ranks import Ranks
from ...weights.scheme import Scheme
from ..build import Builder
from ..pick import pick
from ..plan import Layer, Plan
from .errors import Errors, dense_like, output_errors
from .outcome import Outcome
from .shared import Problem, merged_inputs, shared_outcomes
from .static import with_scale
from .store import Done, Store

Sets = list[list[Layer]]


class Work:
    """Replaces the layers of a plan. Subclasses say how a weight is quantized or pruned.

    Twins are layers that share one weight. They are replaced together.

    Args:
        plan: the layers and the options; its layers get ``new``, or a ``reason``.
        edits: records every change of the model.
    """

    # Whether methods need Hessians, and the inputs of the original, dense model.
    hessian = follow_dense = False
    # Why calibration data is needed, or None; and a method or scheme that needs none.
    needs_data: str | None = None
    without_data = "rtn"
    # The ranks with which this process shares batches, and the outcomes that they found, by ``id(layer)``.
    ranks: Ranks | None = None

    def __init__(self, plan: Plan, edits: Edits) -> None:
        self.plan, self.asked, self.edits = plan, plan.options, edits
        self.builder = Builder(plan)
        self.sets: Sets = plan.twins()
        self._given: dict[int, Outcome | None] = {}
        if self.sets and self.static is not None:
            self.needs_data = f"scheme={str(self.static)!r}: static activations need calibration data"
            self.without_data = str(self.static.dynamic)

    @property
    def schemes(self) -> tuple[Scheme | None, ...]:
        """The dense schemes that a new weight may have; only None: it stays floats."""
        return self.asked.schemes or (None,)

    @property
    def static(self) -> Scheme | None:
        """The first scheme with static activations, whose scales are found now, or None."""
        return next((scheme for scheme in self.asked.schemes if scheme.static), None)

    @property
    def title(self) -> str:
        """The names of the requested schemes in the report."""
        return ", ".join(map(str, self.schemes))

    def begin(self, model: nn.Module, batches: Sequence[Any] | None) -> None:
        """Change the model as a whole before its layers are replaced."""

    def prepare(self, stage: Stage, sets: Sets, inputs: dict[int, Inputs], store: Store | None) -> None:
        """Change the layers of a stage before they are replaced, and ``inputs``, by ``id(layer)``, to match."""

    def solve(self, layer: Layer, scheme: Scheme | None, inputs: Inputs | None) -> Outcome:
        """Compute the new weight of a layer in one of the schemes."""
        raise NotImplementedError

    def make(self, layer: Layer, outcome: Outcome) -> QuantizedModule:
        """Build the replacement; not called if weights stay floats."""
        raise NotImplementedError

    def is_kept(self, layer: Layer) -> bool:
        """Whether the weight is kept unchanged, so that it need not be stored."""
        return False

    def note(self, layer: Layer, outcome: Outcome, errors: Errors) -> None:
        """Record the outcome of a layer for the report."""

    def run(self, model: nn.Module, batches: Sequence[Any] | None, store: Store | None, progress: bool | None) -> None:
        """Replace all layers, on calibration batches if there are any; layers found in the store are not recomputed."""
        sets = list(self.sets)
        layers = [layer.site for twins in sets for layer in twins]
        with bar(len(sets), progress) as advance:
            self.builder.tell = lambda line: advance(line, 0)
            for stage in stages(model, batches, layers, self.follow_dense):
                here = set(stage.layers)
                now = [twins for twins in sets if any(layer.site in here for layer in twins)]
                sets = [twins for twins in sets if twins not in now]
                # Without data each is read in its turn, since a stage is the whole model.
                done = [self._load(twins, store) for twins in now] if stage.runs else []
                inputs = {} if stage.runs and all(done) else self.inputs(stage, self.hessian, self.asked.observer)
                self.prepare(stage, now, inputs, store)
                self._observe_again(stage, inputs)
                self._share_out(now, inputs)
                for twins in now:
                    known = done.pop(0) if stage.runs else self._load(twins, store)
                    self._replace(twins, _inputs_of(twins, inputs), known, store)
                    advance(twins[0].site.name)

    def inputs(self, stage: Stage, hessian: bool, observer: str | None = None) -> dict[int, Inputs]:
        """As ``Stage.inputs``, of the batches of all ranks that share theirs."""
        if self.ranks is None:
            return stage.inputs(hessian, observer)
        return merged_inputs(self.ranks, stage, hessian, observer)

    def _share_out(self, sets: Sets, inputs: dict[int, Inputs]) -> None:
        """Find the new weights of a stage on the ranks that share batches, each on one of them."""
        if self.ranks is not None:
            problems = [Problem(twins, self._schemes_of(twins), _inputs_of(twins, inputs)) for twins in sets]
            outcomes = shared_outcomes(self.ranks, problems, self._outcome)
            self._given = {id(twins[0]): found for twins, found in zip(sets, outcomes, strict=True)}

    def _observe_again(self, stage: Stage, inputs: dict[int, Inputs]) -> None:
        """Run the observers again for inputs that ``prepare`` has scaled."""
        if self.static is not None and any(one.observer is None for one in inputs.values()):
            for key, seen in self.inputs(stage, hessian=False, observer=self.asked.observer).items():
                inputs[key].observer = seen.observer

    def _load(self, twins: Sequence[Layer], store: Store | None) -> Done | None:
        layer = twins[0]
        if store is None or self.is_kept(layer):
            return None
        weight = dense_weight(layer.site.module)
        found = (store.load_done(_entry(layer, scheme), weight, scheme) for scheme in self._schemes_of(twins))
        done = next((done for done in found if done is not None), None)
        # Of several schemes, one that is too slow now makes way for another.
        if done is not None and self.asked.others and not self.builder.accepts(layer, self.make(layer, done.outcome)):
            return None
        return done

    def _replace(self, twins: Sequence[Layer], inputs: Inputs | None, done: Done | None, store: Store | None) -> None:
        first = twins[0]
        if self.builder.is_refused(twins):
            self.builder.leave_refused(twins)
            return
        if done is not None:
            outcome: Outcome | None = done.outcome
        else:
            outcome = self._given.pop(id(first)) if id(first) in self._given else self._outcome(twins, inputs)
        if outcome is None:
            return
        if done is not None:
            for layer in twins:
                layer.tried = done.tried
        errors = self._build(twins, outcome, None if inputs is None else inputs.held_out)
        if first.reason is not None:
            return
        if done is not None:
            errors = done.errors
        elif store is not None and not self.is_kept(first):
            store.save(_entry(first, outcome.scheme), Done(outcome, errors, first.tried).entry())
        for layer in twins:
            self.note(layer, outcome, errors)

    def _outcome(self, twins: Sequence[Layer], inputs: Inputs | None) -> Outcome | None:
        """The new weight of twins; None if none of the schemes is used: they get a ``reason``."""
        whys = {scheme: why_left(twins[0].site.module, scheme) for scheme in self._schemes_of(twins)}
        found = [self._in_scheme(twins, scheme, inputs) for scheme, why in whys.items() if why is None]
        if not self.asked.is_choice:
            return found[0]
        refused = {str(scheme): why for scheme, why in whys.items() if why is not None}
        return pick(twins, found, refused, self.make, None if inputs is None else inputs.held_out, self.builder)

    def _schemes_of(self, twins: Sequence[Layer]) -> tuple[Scheme | None, ...]:
        """What the kind of a layer makes of the schemes that are asked for; in an order that its twins can share."""
        asked = [scheme if scheme is None else twins[0].kind.scheme_of(scheme) for scheme in self.schemes]
        if not all(layer.kind.module.takes_order for layer in twins):
            asked = [scheme and replace(scheme, ordered=False) for scheme in asked]
        return tuple(dict.fromkeys(asked))

    def _in_scheme(self, twins: Sequence[Layer], scheme: Scheme | None, inputs: Inputs | None) -> Outcome:
        first = twins[0]
        outcome = replace(self.solve(first, scheme, inputs), scheme=scheme)
        if scheme is None or not scheme.static:
            return outcome
        return with_scale(twins, outcome, inputs, scheme.act_type, lambda one: self.make(first, one))

    def _build(self, twins: Sequence[Layer], outcome: Outcome, x: Tensor | None) -> Errors:
        """Build the replacement of the twins, measure its error on inputs x (T, K), and put it into the model."""
        dense = twins[0].site.module
        if outcome.scheme is None:
            assert outcome.weight is not None, "without a scheme the outcome holds floats"  # noqa: S101
            new: nn.Module | None = dense_like(dense, outcome.weight)
        else:
            self.builder.build(twins, lambda layer: self.make(layer, outcome))
            new = twins[0].new
        if new is None:
            return Errors()
        errors = output_errors(dense, new, outcome.scheme, x)
        if errors.new is not None and not math.isfinite(errors.new):
            for layer in twins:
                layer.new, layer.reason = None, "the output of its replacement is not finite"
        for layer in twins:
            self._put(layer, outcome)
        return errors

    def _put(self, layer: Layer, outcome: Outcome) -> None:
        """Put the replacement of a layer, or its new weight, into the model."""
        if layer.new is not None:
            self.edits.swap(layer.site, layer.new)
            if not self.edits.undoable:
                self.plan.release(layer)
        elif layer.reason is None and outcome.weight is not None:
            self._place_weight(layer, outcome.weight)
        layer.is_done = layer.reason is None

    def _place_weight(self, layer: Layer, weight: Tensor) -> None:
        old, module = layer.weight, layer.site.module
        new = layer.kind.stored(module, weight)
        self.plan.replace_parameter(old, new)
        self.edits.put(module._parameters, layer.kind.weight.key, new)


def _inputs_of(twins: Sequence[Layer], inputs: Mapping[int, Inputs]) -> Inputs | None:
    """The inputs of twins in one stage: of the one with the most rows."""
    seen = [inputs[id(layer.site.module)] for layer in twins if id(layer.site.module) in inputs]
    return max(seen, key=lambda one: one.rows, default=None)


def _entry(layer: Layer, scheme: Scheme | None) -> str:
    """The name of a layer's result in a store."""
    return f"{layer.site.name} as {scheme}"
