"""The search for chains in a model: from the whole of it down to its parts, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..model.eligible import is_linear_like, why_bound
from .block import Fused
from .pays import Timings
from .watch import is_leaf

# Fewest nodes that compiled steps must compute for a chain to be worth its call.
_LEAST_NODES = 2


@dataclass
class Search:
    """Which modules of a model run fused, and why others do not.

    A round is a run of the model in which each module of the frontier is watched. One that is understood and proved stays
    fused. Of the others, the modules inside are the frontier of the next round. ``wanted``: whether a module, by its
    name, may be fused.
    """

    model: nn.Module
    wanted: Callable[[str], bool] = lambda _: True
    timings: Timings | None = None  # None: chains need not be faster
    skips: bool = False  # whether rows of padding are left out
    int8: bool = False  # whether chains attend in 8 bits
    found: dict[str, Fused] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    frontier: dict[str, Fused] = field(default_factory=dict)
    hook: RemovableHandle | None = None

    def start(self) -> None:
        """Begins with the whole model."""
        self.frontier = self.candidates("", self.model)

    def candidates(self, name: str, module: nn.Module) -> dict[str, Fused]:
        """The module if it may be fused; else the candidates inside it."""
        if is_leaf(module) or is_linear_like(module) or not any(is_linear_like(one) for one in module.modules()):
            return {}
        reason = why_bound(module)
        if reason is None and self.wanted(name) and _has_forward(module):
            return {name: Fused(module, self.timings, self.skips, self.int8)}
        if reason is not None and "forward" in vars(module):
            self.left[name] = reason
        return self.inside(name, module)

    def inside(self, name: str, module: nn.Module) -> dict[str, Fused]:
        """The candidates inside a module."""
        found: dict[str, Fused] = {}
        for key, child in module.named_children():
            found |= self.candidates(f"{name}.{key}" if name else key, child)
        return found

    def begin_round(self) -> None:
        """Puts the modules of the frontier under watch."""
        for fused in self.frontier.values():
            fused.put()

    def end_round(self) -> None:
        """Keeps what was understood, and goes on inside what was not. What did not run is left."""
        later: dict[str, Fused] = {}
        for name, fused in self.frontier.items():
            if fused.first is not None and fused.first.compiled >= _LEAST_NODES:
                self.found[name] = fused
                continue
            fused.take_away()
            reasons = [one for several in fused.kinds.values() for one in several if isinstance(one, str)]
            self.left[name] = reasons[0] if reasons else "it is a single step" if fused.first else "it did not run"
            if reasons:
                later |= self.inside(name, fused.module)
        self.frontier = later

    def run(self, calls: Sequence[Callable[[], Any]]) -> None:
        """Runs the model on the first example until nothing is left to look at, then on all, for other kinds of calls.

        After any exception no module is fused.
        """
        try:
            self.start()
            while self.frontier:
                self.begin_round()
                calls[0]()
                self.end_round()
            for call in calls:
                call()
        except BaseException:
            self.undo()
            raise
        self.stop()

    def arm(self) -> None:
        """Looks for chains in the first calls of the model, instead of now."""
        self.start()
        if self.frontier:
            self.begin_round()
            self.hook = self.model.register_forward_hook(self._after, always_call=True)

    def stop(self) -> None:
        """Looks no more. Kinds of calls that come later need not be timed."""
        for fused in self.found.values():
            fused.timings = None
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        for fused in self.frontier.values():
            fused.take_away()
        self.frontier = {}

    def _after(self, *_: Any) -> None:
        """Ends a round after a call in which modules were watched: not with gradients, or in training."""
        if not any(fused.kinds for fused in self.frontier.values()):
            return
        self.end_round()
        if self.frontier:
            self.begin_round()
        else:
            self.stop()

    def undo(self) -> None:
        """Gives all modules their own forward back."""
        for fused in (*self.frontier.values(), *self.found.values()):
            fused.take_away()
        self.frontier, self.found = {}, {}


def stop_search(model: nn.Module) -> None:
    """Ends a search that waits for the first calls of a model."""
    for hook in list(model._forward_hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Search):
            owner.stop()


def _has_forward(module: nn.Module) -> bool:
    """Whether it can be called, unlike a ModuleList."""
    return type(module).forward is not nn.Module.forward
