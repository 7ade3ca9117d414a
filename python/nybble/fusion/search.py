"""The search for chains in a model: from the whole of it down to its parts, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
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
    found: dict[str, Fused] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    frontier: dict[str, Fused] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)
    in_round: bool = False

    def start(self) -> None:
        """Begins with the whole model."""
        self.frontier = self.candidates("", self.model)

    def candidates(self, name: str, module: nn.Module) -> dict[str, Fused]:
        """The module if it may be fused; else the candidates inside it."""
        if is_leaf(module) or is_linear_like(module) or not any(is_linear_like(one) for one in module.modules()):
            return {}
        reason = why_bound(module)
        if reason is None and self.wanted(name) and _has_forward(module):
            return {name: Fused(module, self.timings)}
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
        for fused in self.found.values():
            fused.timings = None

    def arm(self) -> None:
        """Looks for chains in the first calls of the model, instead of now: inside it, since a call that has begun cannot
        get another forward."""
        self.frontier = self.inside("", self.model)
        if self.frontier:
            self.hooks = [
                self.model.register_forward_pre_hook(self._before),
                self.model.register_forward_hook(self._after, always_call=True),
            ]

    def stop(self) -> None:
        """Looks no more."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        for fused in self.frontier.values():
            fused.take_away()
        self.frontier = {}

    def _before(self, *_: Any) -> None:
        self.in_round = not (is_compiling() or torch.is_grad_enabled() or self.model.training)
        if self.in_round:
            self.begin_round()

    def _after(self, model: nn.Module, args: Any, result: Any) -> None:
        if not self.in_round:
            return
        if result is None:  # an exception, so that some have not run
            for fused in self.frontier.values():
                fused.take_away()
            return
        self.end_round()
        if not self.frontier:
            self.stop()

    def undo(self) -> None:
        """Gives all modules their own forward back."""
        for fused in (*self.frontier.values(), *self.found.values()):
            fused.take_away()
        self.frontier, self.found = {}, {}


def _has_forward(module: nn.Module) -> bool:
    """Whether it can be called, unlike a ModuleList."""
    return type(module).forward is not nn.Module.forward
