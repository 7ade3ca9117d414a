"""Run a model on calibration data a block at a time, so that what is changed first feeds what is changed next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .batches import whole
from .chain import survey
from .eligible import dense_weight
from .inputs import Inputs


@dataclass(frozen=True)
class Stage:
    """Layers that are changed together.

    ``runs`` call what holds them, a batch each; ``dense_runs`` the same on what came in before anything was changed, or
    there are none; ``masks`` are the batches' real tokens, or None.
    """

    name: str
    layers: tuple[nn.Module, ...]
    runs: tuple[Callable[[], object], ...] = ()
    masks: tuple[Tensor | None, ...] = ()
    dense_runs: tuple[Callable[[], object], ...] = ()

    def inputs(self, hessian: bool, observer: str | None = None) -> dict[int, Inputs]:
        """What each layer multiplies, by ``id(layer)``, over all batches; without padding tokens."""
        found = {id(layer): Inputs(dense_weight(layer).shape[1], hessian, observer) for layer in self.layers}
        for b, (run, mask) in enumerate(zip(self.runs, self.masks, strict=True)):
            before = self._seen(self.dense_runs[b], mask) if hessian and self.dense_runs else {}
            for key, calls in self._seen(run, mask).items():
                # A layer that is called otherwise than before has no counterpart for its rows.
                same = [x.shape for x in calls] == [x.shape for x in before.get(key, [])]
                for x, dense in zip(calls, before[key] if same else [None] * len(calls), strict=True):
                    found[key].add(x, dense)
        return found

    def _seen(self, run: Callable[[], object], mask: Tensor | None) -> dict[int, list[Tensor]]:
        """The rows that each layer multiplies, of each of its calls, by ``id(layer)``."""
        seen: dict[int, list[Tensor]] = {}

        def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            seen.setdefault(id(layer), []).append(_rows(x, mask))

        with contextlib.ExitStack() as hooks:
            for layer in self.layers:
                hooks.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
            run()
        return seen


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])


@contextlib.contextmanager
def calm(model: nn.Module) -> Iterator[None]:
    """The model without dropout and caches, and as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    caches = bool(getattr(config, "use_cache", False))
    try:
        model.eval()
        if caches:
            config.use_cache = False
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        if caches:
            config.use_cache = True


def stages(
    model: nn.Module, batches: Sequence[Any] | None, layers: Sequence[nn.Module], follow_dense: bool = False
) -> Iterator[Stage]:
    """The model's layers in the order in which data reaches them; each stage sees those before it as they are by then.

    With repeated blocks (the largest ModuleList, if it is a chain) these are: the layers before the blocks, each block,
    and what comes after. Of the blocks' activations only those between two of them are held. Without, all layers are
    one stage. Without batches there is no data.

    follow_dense: give the blocks their ``dense_runs``; then four times as many activations are held.
    """
    if batches is None:
        yield Stage("the model", tuple(layers))
        return
    runs, masks = whole(model, batches)
    found = survey(model, runs[0], layers)
    if found.chain is None:
        yield Stage("the model", tuple(layers), runs, masks)
        return
    # Found before anything is replaced: then the layers are no longer in their blocks.
    inside = found.chain.inside(layers)
    rest = tuple(layer for layer in layers if layer not in found.before and not any(layer in here for here in inside))
    # What came into the first block before anything was changed.
    dense = found.chain.capture(runs).hidden if found.before and follow_dense else None
    if found.before:
        yield Stage("before the blocks", found.before, runs, masks)
    feed = found.chain.capture(runs)
    if follow_dense:
        feed.dense = list(feed.hidden) if dense is None else dense
    for i, here in enumerate(inside):
        dense_calls = feed.dense_runners(i)
        feed.advance_dense(i)
        yield Stage(f"{found.chain.name}.{i}", here, feed.runners(i), masks, dense_calls)
        feed.advance(i)
    if rest:
        yield Stage("beside the blocks", rest, runs, masks)
