"""The types of activations, a16, a8 and a7: which codes each has. A row of the table is a type."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ActivationType:
    """Activations as integer codes, x = (code - zero_point) * scale, or floating-point numbers as they come.

    Args:
        bits: the number in the name of a scheme, a8; no two types have the same.
        quantized: whether they are codes.
        sparse: whether they go with sparse weights.
    """

    bits: int
    quantized: bool = True
    sparse: bool = True

    @property
    def name(self) -> str:
        return f"a{self.bits}"

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def steps(self) -> int:
        """How many steps there are from the lowest code to the highest; the zero point is one of the codes."""
        return (1 << self.bits) - 1


_BUILT_IN = (
    # vpmaddubsw adds two products of u7 and s8 in 16 bits without saturating: twice as many products an instruction.
    ActivationType(7, sparse=False),
    ActivationType(8),
    ActivationType(16, quantized=False),
)


def activation_types() -> dict[int, ActivationType]:
    """The table, by bits."""
    return {row.bits: row for row in _BUILT_IN}
