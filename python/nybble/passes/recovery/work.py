"""The stages of recover: block by block, then end to end; a stage is kept only if its held-out loss is lower."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...model.batches import call, model_calls
from ...model.chain import Chain, survey
from .correct import Run, correct
from .losses import kind_of, relative, whole_loss
from .report import Recovered, RecoveredStage
from .sites import Pair, pairs
from .store import Store
from .train import Task, restore, search, state_of, train

_HELD_OUT_ONE_IN, _HELD_OUT_MOST = 8, 16


class Settings(NamedTuple):
    """The options of ``recover``. epochs: of each block. end_to_end_epochs: of the whole model.

    learning_rate: None to search.
    """

    epochs: int
    end_to_end_epochs: int
    learning_rate: float | None
    loss: str
    seed: int


@dataclass(frozen=True)
class Part:
    """A part of the model to train: a block, or all of it.

    loss: of batch b, with the modules that are in the model. runs, dense_runs: calls of the part in the model and in the
    reference for each batch, for the closed-form correction; empty to skip it.
    """

    name: str
    layers: tuple[Pair, ...]
    loss: Callable[[int], Tensor]
    runs: Sequence[Run] = ()
    dense_runs: Sequence[Run] = ()


class Work:
    """Trains the layers of a model against its reference.

    Raises:
        ValueError: see ``pairs``.
    """

    def __init__(
        self, model: nn.Module, reference: nn.Module, batches: Sequence[Any], asked: Settings, store: Store | None
    ) -> None:
        self._model, self._reference, self._batches = model, reference, batches
        self._asked, self._store = asked, store
        self._pairs, self._left = pairs(model, reference)
        self._original = [pair.layer for pair in self._pairs]
        self._masks = model_calls(model, batches)[1]
        one_in = max(_HELD_OUT_ONE_IN, -(-len(batches) // _HELD_OUT_MOST))
        self._held_out_batches = range(one_in - 1, len(batches), one_in) or range(len(batches) - 1, len(batches))
        self._train_batches = [b for b in range(len(batches)) if b not in self._held_out_batches]
        with torch.no_grad():
            self._kind = kind_of(asked.loss, call(reference, batches[0]))

    @property
    def count(self) -> int:
        """An upper limit of the number of stages."""
        return len(self._pairs) + 1

    def undo(self) -> None:
        """Restore the original layers of the model."""
        for pair, layer in zip(self._pairs, self._original, strict=True):
            pair.put(layer)

    def run(self, advance: Callable[[str], None]) -> Recovered:
        """Run all stages. The model ends with the layers of the lowest held-out loss, which may be the original ones."""
        everything = Part("end to end", tuple(self._pairs), self._whole)
        before = now = self._held_out(everything)
        done: list[RecoveredStage] = []
        for part in self._blocks():
            # The learning rate found for the first block serves all blocks, since they are alike.
            rate = done[0].learning_rate if done else self._asked.learning_rate
            done.append(self._stage(part, self._asked.epochs, rate))
            advance(part.name)
        if done:
            now = self._held_out(everything)
            if not now < before:
                self.undo()
                done, now = [stage_undone(stage) for stage in done], before
        elif self._asked.end_to_end_epochs:
            model, dense = model_calls(self._model, self._batches)[0], model_calls(self._reference, self._batches)[0]
            everything = Part(everything.name, everything.layers, self._whole, model, dense)
        if self._asked.end_to_end_epochs:
            done.append(self._stage(everything, self._asked.end_to_end_epochs, self._asked.learning_rate))
            now = done[-1].after
            advance(everything.name)
        return Recovered(self._kind, before, now, tuple(done), self._left)

    def _whole(self, b: int) -> Tensor:
        with torch.no_grad():
            wanted = call(self._reference, self._batches[b])
        return whole_loss(self._kind, call(self._model, self._batches[b]), wanted, self._masks[b])

    def _held_out(self, part: Part) -> float:
        return Task((), part.loss, (), self._held_out_batches).held_out()

    def _blocks(self) -> Iterator[Part]:
        """The blocks with layers to train; each runs on the outputs of the recovered blocks before it."""
        chains = self._chains()
        if chains is None or not self._asked.epochs:
            return
        ours, theirs = chains
        with torch.no_grad():
            feed, dense = (
                ours.capture(model_calls(self._model, self._batches)[0]),
                theirs.capture(model_calls(self._reference, self._batches)[0]),
            )
        # Found now, since replaced layers are no longer inside their blocks.
        inside = [set(map(id, here)) for here in ours.inside([pair.layer for pair in self._pairs])]
        here = [tuple(pair for pair in self._pairs if id(pair.layer) in found) for found in inside]
        for i, layers in enumerate(here):
            runs, dense_runs = feed.runners(i), dense.runners(i)
            with torch.no_grad():
                wanted = [_first(run()) for run in dense_runs]

            def loss(b: int, runs: Sequence[Run] = runs, wanted: Sequence[Tensor] = wanted) -> Tensor:
                return relative(_first(runs[b]()), wanted[b], self._masks[b])

            if layers:
                yield Part(f"{ours.name}.{i}", layers, loss, runs, dense_runs)
            with torch.no_grad():
                feed.advance(i)
            dense.hidden[:] = wanted

    def _chains(self) -> tuple[Chain, Chain] | None:
        """The chains of blocks of the model and of the reference, or None if they differ in length or there are none."""
        found = []
        with torch.no_grad():
            for module in (self._model, self._reference):
                found.append(survey(module, model_calls(module, self._batches[:1])[0][0], ()).chain)
        ours, theirs = found
        return (ours, theirs) if ours and theirs and len(ours.blocks) == len(theirs.blocks) else None

    def _stage(self, part: Part, epochs: int, rate: float | None) -> RecoveredStage:
        names = tuple(pair.site.name for pair in part.layers)
        held = self._store.load(part.name, [pair.layer for pair in part.layers]) if self._store else None
        if held is not None:
            for pair, layer in zip(part.layers, held.layers, strict=True):
                pair.put(layer)
            return RecoveredStage(part.name, names, **held.facts)
        old = [pair.layer for pair in part.layers]
        before = self._held_out(part)
        shadows = [pair.shadow() for pair in part.layers]
        _place(part.layers, shadows)
        task = Task(shadows, part.loss, self._train_batches, self._held_out_batches)
        if part.runs:
            self._correct(part, task)
        rate = rate or search(task, self._asked.seed, epochs * len(self._train_batches))
        fit = train(task, rate, epochs, self._asked.seed)
        _place(part.layers, [shadow.make() for shadow in shadows])
        after = self._held_out(part)
        # Compare on the real kernels, which also round activations.
        kept = math.isfinite(after) and after < before
        if not kept:
            _place(part.layers, old)
        facts: dict[str, Any] = {
            "before": before,
            "after": after if kept else before,
            "steps": fit.steps,
            "learning_rate": rate,
            "kept": kept,
            "note": fit.ended,
        }
        if self._store is not None:
            self._store.save(part.name, [pair.layer for pair in part.layers], facts)
        return RecoveredStage(part.name, names, **facts)

    def _correct(self, part: Part, task: Task) -> None:
        """Apply the closed-form correction; undo it unless the held-out loss is lower."""
        start, before = state_of(task), task.held_out()
        runs, dense_runs = ([them[b] for b in self._train_batches] for them in (part.runs, part.dense_runs))
        both = [(own, pair.dense) for own, pair in zip(task.shadows, part.layers, strict=True) if own.takes_rows]
        correct([own for own, _ in both], [dense for _, dense in both], runs, dense_runs)
        if not task.held_out() < before:
            restore(task, start)


def _place(layers: Sequence[Pair], modules: Sequence[nn.Module]) -> None:
    for pair, module in zip(layers, modules, strict=True):
        pair.put(module)


def stage_undone(stage: RecoveredStage) -> RecoveredStage:
    """The report of a block whose result was not kept, since the loss of the whole model was not lower."""
    note = f"{stage.note}; the loss of the whole model was not lower"
    return replace(stage, after=stage.before, kept=False, note=note)


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found
