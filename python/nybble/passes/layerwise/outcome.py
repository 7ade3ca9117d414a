"""What a method made of a weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...weights.activations import ActScale
from ...weights.rounding import QuantizedWeight


@dataclass(frozen=True)
class Outcome:
    """A new weight: (N, K) in its own dtype, its codes, or both where it was pruned and rounded in one go.

    act: how static activations are rounded; None: they are dynamic, or floats. method: the one that made it in the end. notes: why that is not the one that was asked for, and what else happened.
    """

    weight: Tensor | None
    method: str
    notes: tuple[str, ...] = ()
    quantized: QuantizedWeight | None = None
    act: ActScale | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        held = {} if self.weight is None else {"weight": self.weight}
        held |= {} if self.quantized is None else self.quantized.tensors()
        return held | ({} if self.act is None else self.act.tensors())
