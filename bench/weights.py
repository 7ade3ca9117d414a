"""Kinds of weights, given by scheme and share of zero blocks, and random weights of a kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..testing.oracle import random_mask, random_weight
from ..weights.rounding import QuantizedWeight, pack_nibbles, unpack_nibbles
from ..weights.scheme import Scheme
from ..weights.sparsity import Block, Pattern


@dataclass(frozen=True)
class WeightKind:
    """A scheme and, for block sparsity, the share of zero blocks, which is not part of the scheme."""

    scheme: Scheme
    zero_blocks: float = 0.5

    @classmethod
    def parse(cls, text: str) -> WeightKind:
        """Parses ``"sp50w8a8"``, or ``"bs32x32w8a8:75%"`` for 75 % of zero blocks.

        Raises:
            ValueError: invalid scheme or share.
        """
        name, colon, share = text.partition(":")
        scheme = Scheme.parse(name)
        if not colon:
            return cls(scheme)
        return cls(scheme, Pattern.parse(f"{scheme.sparsity}:{share}").zeros)  # rejects shares for other patterns

    def __str__(self) -> str:
        blocks = isinstance(self.scheme.sparsity, Block)
        return f"{self.scheme}:{self.zero_blocks:.0%}" if blocks else str(self.scheme)

    @property
    def pattern(self) -> Pattern | None:
        """The sparsity pattern; None for dense weights."""
        sparsity = self.scheme.sparsity
        if sparsity is None:
            return None
        return Pattern(sparsity, self.zero_blocks if isinstance(sparsity, Block) else sparsity.zeros)

    def draw(self, n: int, k: int) -> QuantizedWeight:
        """A random weight (n, k), always the same. Stored codes are never zero: 1/16 of random 4-bit codes would be, but
        pruning keeps large weights, of which hardly any are."""
        if self.scheme.sparsity is None:
            return random_weight(self.scheme, n, k)
        dense = random_weight(self.scheme.dense, n, k)
        kept = random_mask(self.scheme, n, k, torch.Generator().manual_seed(1), self.zero_blocks)
        if self.scheme.weight_bits == 8:
            codes = dense.qweight.where(dense.qweight != 0, 1)
            return QuantizedWeight(codes * kept, dense.scale)
        codes = unpack_nibbles(dense.qweight, k)
        return QuantizedWeight(pack_nibbles(codes.where(codes != 8, 9).where(kept, 8)), dense.scale)
