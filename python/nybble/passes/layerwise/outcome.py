"""The result of a quantization or pruning method for one weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...weights import activations
from ...weights.activations import ActScale
from ...weights.rounding import QuantizedWeight
from ...weights.scheme import Scheme


@dataclass(frozen=True)
class Outcome:
    """A new weight: float (N, K), quantized, or both if it was pruned and rounded in one pass.

    method: the one that produced it, after any fallback. notes: why a fallback was taken, and other remarks.
    act: the scale of static activations; None if they are dynamic or float. scheme: the dense scheme of the codes; None:
    they stay floats.
    """

    weight: Tensor | None
    method: str
    notes: tuple[str, ...] = ()
    quantized: QuantizedWeight | None = None
    act: ActScale | None = None
    scheme: Scheme | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are not None, by name."""
        held = {} if self.weight is None else {"weight": self.weight}
        held |= {} if self.quantized is None else self.quantized.tensors()
        return held | ({} if self.act is None else self.act.tensors())

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], method: str, notes: tuple[str, ...], scheme: Scheme | None
    ) -> Outcome:
        """The inverse of ``tensors``."""
        act = None
        if scheme is not None and activations.SPEC.keys() <= tensors.keys():
            act = ActScale.of_tensors(tensors, scheme.act_type)
        held = {key: value for key, value in tensors.items() if key not in activations.SPEC}
        weight = held.pop("weight", None)
        return cls(weight, method, notes, QuantizedWeight(**held) if held else None, act, scheme)
