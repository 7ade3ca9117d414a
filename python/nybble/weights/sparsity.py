"""Patterns of zero weights: unstructured, n:m, and blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

_GRAMMAR = "'50%', '2:4' or any n:m of up to 128 (n kept of m inputs), or blocks such as 'bs32x32:75%'"
_MOST_M = 128
_BLOCK_ROWS, _BLOCK_COLUMNS = 16, 4


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere. percent (1 to 99): about how many of the weights are zero."""

    percent: int

    def __post_init__(self) -> None:
        if not 1 <= self.percent <= 99:
            raise ValueError(f"percent={self.percent}: must be in 1..99")
        if self.percent == 24:
            raise ValueError("percent=24: sp24 is the name of 2:4; use 23 or 25")

    @property
    def zeros(self) -> float:
        """The share of weights that are zero."""
        return self.percent / 100

    def __str__(self) -> str:
        return f"sp{self.percent}"


@dataclass(frozen=True)
class NofM:
    """n:m sparsity: at most n of each m consecutive inputs of an output have a weight that is not zero."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= _MOST_M:
            raise ValueError(f"n={self.n}, m={self.m}: must be 1 <= n < m <= {_MOST_M}")

    @property
    def zeros(self) -> float:
        """The least share of weights that are zero."""
        return 1 - self.n / self.m

    def kept(self, inputs: int) -> int:
        """The most weights that a group of this many inputs keeps: ceil(n * inputs / m), which is n for m inputs."""
        return -(-self.n * inputs // self.m)

    def __str__(self) -> str:
        return "sp24" if (self.n, self.m) == (2, 4) else f"sp{self.n}of{self.m}"


@dataclass(frozen=True)
class Block:
    """Block sparsity: blocks of rows x columns weights (outputs x inputs), each either zero or dense.

    rows: a multiple of 16; columns: a multiple of 4; both at most 128, as the kernels multiply them.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        for name, value, unit in (("rows", self.rows, _BLOCK_ROWS), ("columns", self.columns, _BLOCK_COLUMNS)):
            if value % unit or not unit <= value <= 128:
                raise ValueError(f"{name}={value}: must be a multiple of {unit} up to 128")

    def count(self, out_features: int, in_features: int) -> int:
        """The number of blocks of a layer, with the partial ones at its edges."""
        return -(-out_features // self.rows) * -(-in_features // self.columns)

    def __str__(self) -> str:
        return f"bs{self.rows}x{self.columns}"


Sparsity = Unstructured | NofM | Block


class Pattern(NamedTuple):
    """What a pruning pass makes: a pattern, and the share of weights that become zero."""

    sparsity: Sparsity
    zeros: float

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Reads ``"50%"``, ``"2:4"``, ``"32:128"`` or ``"bs32x32:75%"``; a Pattern is returned as it is.

        Raises:
            ValueError: not a pattern, or a number out of its range.
            TypeError: neither a string nor a Pattern.
        """
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise TypeError(f"pattern={text!r}: must be a string or a Pattern")
        try:
            if found := re.fullmatch(r"(\d{1,3})%", text):
                free = Unstructured(int(found[1]))
                return cls(free, free.zeros)
            if found := re.fullmatch(r"(\d{1,3}):(\d{1,3})", text):
                kept = NofM(int(found[1]), int(found[2]))
                return cls(kept, kept.zeros)
            if found := re.fullmatch(r"bs(\d{1,3})x(\d{1,3}):(\d{1,2})%", text):
                return cls(Block(int(found[1]), int(found[2])), Unstructured(int(found[3])).zeros)
        except ValueError as error:
            raise ValueError(f"pattern={text!r}: {error}") from None
        raise ValueError(f"pattern={text!r}: must be {_GRAMMAR}")

    def __str__(self) -> str:
        return f"{self.sparsity}:{self.zeros:.0%}" if isinstance(self.sparsity, Block) else str(self.sparsity)


def parse_name(name: str) -> Sparsity:
    """The sparsity of a scheme's prefix: sp50, sp24 (2:4), sp32of128, bs32x32. Raises ValueError."""
    if name == "sp24":
        return NofM(2, 4)
    numbers = [int(digits) for digits in re.findall(r"\d+", name)]
    if name.startswith("bs"):
        return Block(*numbers)
    return NofM(*numbers) if "of" in name else Unstructured(*numbers)
