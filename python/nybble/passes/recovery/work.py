"""Win layers back block by block, then all together; each step is kept only where held-out data says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...model.batches import call, whole
from ...model.chain import Chain, survey
from .correct import Run, correct
from .losses import kind_of, relative, whole_loss
from .report import Recovered, RecoveredStage
from .sites import Pair, pairs
from .store import Store
from .train import Task, restore, search, state_of, train

_JUDGE_ONE_IN, _JUDGE_MOST = 8, 16


class Settings(NamedTuple):
    """epochs: of a block; end_to_end: of the whole model; rate: None for a search."""

    epochs: int
    end_to_end: int
    rate: float | None
    loss: str
    seed: int


@dataclass(frozen=True)
class Scene:
    """Where layers are trained: the loss of each batch with what stands in the model, and runs for the closed form."""

    name: str
    layers: tuple[Pair, ...]
    loss: Callable[[int], Tensor]
    runs: Sequence[Run] = ()
    dense_runs: Sequence[Run] = ()


class Work:
    """The layers of a model on their way back to its reference.

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
        self._masks = whole(model, batches)[1]
        one_in = max(_JUDGE_ONE_IN, -(-len(batches) // _JUDGE_MOST))
        self._judge = range(one_in - 1, len(batches), one_in) or range(len(batches) - 1, len(batches))
        self._teach = [b for b in range(len(batches)) if b not in self._judge]
        with torch.no_grad():
            self._kind = kind_of(asked.loss, call(reference, batches[0]))

    @property
    def count(self) -> int:
        """How many stages there will be at most."""
        return len(self._pairs) + 1

    def undo(self) -> None:
        """Put back the layers that the model had."""
        for pair, layer in zip(self._pairs, self._original, strict=True):
            pair.put(layer)

    def run(self, advance: Callable[[str], None]) -> Recovered:
        """All stages. The model ends with the layers that have the lowest held-out loss, its own perhaps."""
        everything = Scene("end to end", tuple(self._pairs), self._whole)
        before = now = self._held_out(everything)
        done: list[RecoveredStage] = []
        for scene in self._blocks():
            # What suits the first block suits the others: they are alike.
            rate = done[0].rate if done else self._asked.rate
            done.append(self._stage(scene, self._asked.epochs, rate))
            advance(scene.name)
        if done:
            now = self._held_out(everything)
            if not now < before:
                self.undo()
                done, now = [stage_undone(stage) for stage in done], before
        elif self._asked.end_to_end:
            model, dense = whole(self._model, self._batches)[0], whole(self._reference, self._batches)[0]
            everything = Scene(everything.name, everything.layers, self._whole, model, dense)
        if self._asked.end_to_end:
            done.append(self._stage(everything, self._asked.end_to_end, self._asked.rate))
            now = done[-1].after
            advance(everything.name)
        return Recovered(self._kind, before, now, tuple(done), self._left)

    def _whole(self, b: int) -> Tensor:
        with torch.no_grad():
            wanted = call(self._reference, self._batches[b])
        return whole_loss(self._kind, call(self._model, self._batches[b]), wanted, self._masks[b])

    def _held_out(self, scene: Scene) -> float:
        return Task((), scene.loss, (), self._judge).held_out()

    def _blocks(self) -> Iterator[Scene]:
        """The blocks that have layers to win back, each on what comes out of those before it by then; or none."""
        chains = self._chains()
        if chains is None or not self._asked.epochs:
            return
        ours, theirs = chains
        with torch.no_grad():
            feed, dense = (
                ours.capture(whole(self._model, self._batches)[0]),
                theirs.capture(whole(self._reference, self._batches)[0]),
            )
        # Found before anything is replaced: then the layers are no longer in their blocks.
        inside = [set(map(id, here)) for here in ours.inside([pair.layer for pair in self._pairs])]
        here = [tuple(pair for pair in self._pairs if id(pair.layer) in found) for found in inside]
        for i, layers in enumerate(here):
            runs, dense_runs = feed.runners(i), dense.runners(i)
            with torch.no_grad():
                wanted = [_first(run()) for run in dense_runs]

            def loss(b: int, runs: Sequence[Run] = runs, wanted: Sequence[Tensor] = wanted) -> Tensor:
                return relative(_first(runs[b]()), wanted[b], self._masks[b])

            if layers:
                yield Scene(f"{ours.name}.{i}", layers, loss, runs, dense_runs)
            with torch.no_grad():
                feed.advance(i)
            dense.hidden[:] = wanted

    def _chains(self) -> tuple[Chain, Chain] | None:
        """The blocks of the model and of the reference, where both have as many."""
        found = []
        with torch.no_grad():
            for module in (self._model, self._reference):
                found.append(survey(module, whole(module, self._batches[:1])[0][0], ()).chain)
        ours, theirs = found
        return (ours, theirs) if ours and theirs and len(ours.blocks) == len(theirs.blocks) else None

    def _stage(self, scene: Scene, epochs: int, rate: float | None) -> RecoveredStage:
        names = tuple(pair.site.name for pair in scene.layers)
        held = self._store.load(scene.name, [pair.layer for pair in scene.layers]) if self._store else None
        if held is not None:
            for pair, layer in zip(scene.layers, held.layers, strict=True):
                pair.put(layer)
            return RecoveredStage(scene.name, names, **held.facts)
        old = [pair.layer for pair in scene.layers]
        before = self._held_out(scene)
        shadows = [pair.shadow() for pair in scene.layers]
        _place(scene.layers, shadows)
        task = Task(shadows, scene.loss, self._teach, self._judge)
        if scene.runs:
            self._correct(scene, task)
        rate = rate or search(task, self._asked.seed, epochs * len(self._teach))
        fit = train(task, rate, epochs, self._asked.seed)
        _place(scene.layers, [shadow.make() for shadow in shadows])
        after = self._held_out(scene)
        # Better as it runs, not only as it was trained: activations are rounded now.
        kept = math.isfinite(after) and after < before
        if not kept:
            _place(scene.layers, old)
        facts: dict[str, Any] = {
            "before": before,
            "after": after if kept else before,
            "steps": fit.steps,
            "rate": rate,
            "kept": kept,
            "note": fit.ended,
        }
        if self._store is not None:
            self._store.save(scene.name, [pair.layer for pair in scene.layers], facts)
        return RecoveredStage(scene.name, names, **facts)

    def _correct(self, scene: Scene, task: Task) -> None:
        """The closed form, where it is better on held-out data."""
        start, before = state_of(task), task.held_out()
        runs, dense_runs = ([them[b] for b in self._teach] for them in (scene.runs, scene.dense_runs))
        correct(task.shadows, [pair.dense for pair in scene.layers], runs, dense_runs)
        if not task.held_out() < before:
            restore(task, start)


def _place(layers: Sequence[Pair], modules: Sequence[nn.Module]) -> None:
    for pair, module in zip(layers, modules, strict=True):
        pair.put(module)


def stage_undone(stage: RecoveredStage) -> RecoveredStage:
    """A block whose gain was lost in the whole."""
    note = f"{stage.note}; the whole model was not better"
    return RecoveredStage(stage.name, stage.layers, stage.before, stage.before, stage.steps, stage.rate, False, note)


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found
