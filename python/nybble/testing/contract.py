"""The table of modules that the contract suite runs on: what every kind of module that nybble replaces must be able to do.

A row is a dense module in a model, inputs for it, and the schemes that it can have. The suite is tests/test_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Contract:
    """A module that the suite runs on.

    Attributes:
        name: of the row.
        dense: makes the dense module, with the random state as it is.
        inputs: makes the arguments of a call.
        schemes: those that are tried.
        bad: calls that must be refused: arguments, and a pattern that the message of the error must match.
        least_coverage: percent of the weight bytes that must be quantized.
        closeness: the largest relative error of the output against the dense module, by scheme; of others 0.05.
    """

    name: str
    dense: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    schemes: tuple[str, ...]
    bad: tuple[tuple[tuple[Any, ...], str], ...] = ()
    least_coverage: float = 95.0
    closeness: tuple[tuple[str, float], ...] = (("w4a8", 0.3), ("w4a16", 0.3))

    def error_of(self, scheme: str) -> float:
        """The largest relative error that a scheme may have."""
        return next((most for start, most in self.closeness if scheme.startswith(start)), 0.05)


class Holder(nn.Module):
    """A model that is nothing but one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        """The layer's output."""
        return self.layer(*args)


def _rows(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape),)


CONTRACTS: tuple[Contract, ...] = (
    Contract(
        "Linear",
        lambda: nn.Linear(71, 33),
        _rows(5, 71),
        ("w8a8", "w8a16", "w4a8", "w4a16g32", "w4a8g64asym"),
        bad=(((torch.zeros(5, 70),), r"K=71|71"), ((torch.zeros(5, 71, dtype=torch.float64),), "float64")),
    ),
    Contract("Linear without bias", lambda: nn.Linear(40, 1, bias=False), _rows(2, 3, 40), ("w8a8",)),
    Contract(
        "LSTM",
        lambda: nn.LSTM(33, 19, 2, bidirectional=True),
        _rows(7, 3, 33),
        ("w8a8", "w8a16", "w4a8", "w4a16g32"),
        bad=(((torch.zeros(7, 3, 32),), "input_size=33"), ((torch.zeros(7, 3, 33, dtype=torch.float64),), "float64")),
    ),
    Contract("GRU", lambda: nn.GRU(48, 64, batch_first=True), _rows(4, 5, 48), ("w8a8", "w4a8g32")),
    Contract("GRU of one sequence, without bias", lambda: nn.GRU(9, 1, bias=False), _rows(1, 9), ("w8a8",)),
)
