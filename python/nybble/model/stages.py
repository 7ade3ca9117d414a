"""Run a model on calibration data block by block, so that each block sees the outputs of the changed blocks before it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..nn.kinds import kind_of
from .batches import model_calls
from .chain import Chain, survey
from .eligible import dense_weight
from .inputs import Inputs
from .rows import rows_of
from .walk import Site


@dataclass(frozen=True)
class Stage:
    """Layers that are changed together, such as those of one block.

    ``runs``: a call of the block (or the model) for each batch. ``dense_runs``: the same with the inputs of the original
    model, or empty. ``masks``: each batch's attention mask (bool), or None.
    """

    name: str
    layers: tuple[Site, ...]
    runs: tuple[Callable[[], object], ...] = ()
    masks: tuple[Tensor | None, ...] = ()
    dense_runs: tuple[Callable[[], object], ...] = ()

    def inputs(self, hessian: bool, observer: str | None = None, offset: int | None = 0) -> dict[int, Inputs]:
        """The input statistics of each layer over all batches, by ``id(module)``; padding tokens are left out.

        offset: how many rows other processes have before these, see ``Inputs``.
        """
        modules = [site.module for site in self.layers if kind_of(site.module).why_no_rows(site.module) is None]
        found = {id(module): Inputs(dense_weight(module).shape[1], hessian, observer, offset) for module in modules}
        for b, (run, mask) in enumerate(zip(self.runs, self.masks, strict=True)):
            before = _seen(modules, self.dense_runs[b], mask) if hessian and self.dense_runs else {}
            for key, calls in _seen(modules, run, mask).items():
                # A layer that gets other shapes than in the original model has no matching rows there.
                same = [x.shape for x in calls] == [x.shape for x in before.get(key, [])]
                for x, dense in zip(calls, before[key] if same else [None] * len(calls), strict=True):
                    found[key].add(x, dense)
        return found


def _seen(layers: Sequence[nn.Module], run: Callable[[], object], mask: Tensor | None) -> dict[int, list[Tensor]]:
    """The input rows of each call of each layer, by ``id(module)``."""
    seen: dict[int, list[Tensor]] = {}

    def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        seen.setdefault(id(layer), []).append(rows_of(layer, x, mask))

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
        run()
    return seen


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without a KV cache (``config.use_cache``); both are restored afterwards."""
    # By weak references: what the body replaces may be freed in it.
    training = weakref.WeakKeyDictionary({module: module.training for module in model.modules()})
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
    model: nn.Module, batches: Sequence[Any] | None, layers: Sequence[Site], follow_dense: bool = False
) -> Iterator[Stage]:
    """The stages of a model in the order in which they run. A stage runs on the changed layers before it.

    If the largest ModuleList is a chain of blocks, the stages are: the layers before the blocks, each block, and the
    layers after them; only the hidden states between two blocks are held. Otherwise all layers are one stage. Without
    batches, stages have no runs.

    follow_dense: also fill ``dense_runs`` of the blocks; this holds four times as many activations.
    """
    if batches is None:
        yield Stage("the model", tuple(layers))
        return
    runs, masks = model_calls(model, batches)
    found = _order(model, runs[0], layers)
    if found is None:
        yield Stage("the model", tuple(layers), runs, masks)
        return
    # The original model's input of the first block.
    dense = found.chain.capture(runs).hidden if found.before and follow_dense else None
    if found.before:
        yield Stage("before the blocks", found.before, runs, masks)
    feed = found.chain.capture(runs)
    if follow_dense:
        feed.dense = list(feed.hidden) if dense is None else dense
    for i, here in enumerate(found.inside):
        dense_calls = feed.dense_runners(i)
        feed.advance_dense(i)
        yield Stage(f"{found.chain.name}.{i}", here, feed.runners(i), masks, dense_calls)
        feed.advance(i)
    if found.rest:
        yield Stage("beside the blocks", found.rest, runs, masks)


class _Order(NamedTuple):
    """A chain of blocks, and the layers that run before it, that are inside each block, and all others."""

    chain: Chain
    before: tuple[Site, ...]
    inside: tuple[tuple[Site, ...], ...]
    rest: tuple[Site, ...]


def _order(model: nn.Module, run: Callable[[], object], layers: Sequence[Site]) -> _Order | None:
    """Where layers are in a chain of blocks, or None if there is none. Later, replaced ones are no longer inside."""
    sites = {site.module: site for site in layers}
    found = survey(model, run, tuple(sites))
    if found.chain is None:
        return None
    inside = found.chain.inside(tuple(sites))
    placed = {*found.before, *(module for here in inside for module in here)}
    return _Order(
        found.chain,
        tuple(sites[module] for module in found.before),
        tuple(tuple(sites[module] for module in here) for here in inside),
        tuple(site for module, site in sites.items() if module not in placed),
    )
