"""Modules with several weights, such as an LSTM: opened into members that are Linear layers, which the passes then see.

A pass *opens* a dense module with several weights: it puts a ``CompositeModule`` in its place, whose members are
``nn.Linear`` layers on the very same memory. Each member is then quantized or pruned like any other Linear layer. At its
end the pass closes the modules whose members all stayed dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from .module import QuantizedModule


class CompositeModule(nn.Module):
    """What replaces a dense module with several weights. Its members are named after the weights.

    A subclass adds ``forward`` and ``close``. Its forward computes as the dense module does while all members are dense;
    calls each member if one ``is_watched``, so that hooks see their inputs; and else may run quantized members in one
    call.

    Args:
        members: Linear layers by name; of many alike, a ModuleList.
    """

    def __init__(self, members: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in members.items():
            self.add_module(name, module)
        self._names = tuple(members)

    def members(self) -> Iterator[nn.Module]:
        """The members: Linear layers, dense or quantized, or what took their places."""
        for name in self._names:
            module = self._modules[name]
            if isinstance(module, nn.ModuleList):
                yield from module
            elif module is not None:
                yield module

    @property
    def is_dense(self) -> bool:
        """Whether no member is quantized."""
        return not any(isinstance(module, QuantizedModule) for module in self.members())

    def is_watched(self) -> bool:
        """Whether a member must be called as a module, since it does more than multiply by its weight.

        That is so with hooks, with a replaced ``forward``, with parametrizations, for other modules than Linear layers,
        and under autograd if a dense weight is trained.
        """
        grad = torch.is_grad_enabled()
        return any(_is_watched(module, grad) for module in self.members())

    def close(self) -> nn.Module:
        """The dense module again, with the members' weights as they are now; those of quantized members are dequantized."""
        raise NotImplementedError


def _is_watched(member: nn.Module, grad: bool) -> bool:
    if member._forward_pre_hooks or member._forward_hooks or member._backward_hooks or member._backward_pre_hooks:
        return True
    if not isinstance(member, (nn.Linear, QuantizedModule)):
        return True
    if "forward" in vars(member) or parametrize.is_parametrized(member):
        return True
    weight = member._parameters.get("weight")
    return grad and weight is not None and weight.requires_grad


def _never(module: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class CompositeKind:
    """Dense modules with several weights, and how they are opened.

    Attributes:
        name: unique in the table of module kinds.
        matches: whether a dense module is of this kind; must not raise.
        open: a CompositeModule for a dense module, on the memory of its parameters; the dense module does not change.
        why_not: why a module of this kind cannot be opened, or None.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    open: Callable[[nn.Module], CompositeModule]
    why_not: Callable[[nn.Module], str | None] = _never
