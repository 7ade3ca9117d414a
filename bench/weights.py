"""What a kernel's weight is: its scheme and, of blocks, how many are zero; and random ones of that kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..testing.oracle import random_mask, random_weight
from ..weights.rounding import QuantizedWeight, pack_nibbles, unpack_nibbles
from ..weights.scheme import Scheme
from ..weights.sparsity import Block, Pattern


@dataclass(frozen=True)
class WeightKind:
    """A scheme; zero_blocks: the share of blocks that are zero, which the scheme of blocks does not say."""

    scheme: Scheme
    zero_blocks: float = 0.5

    @classmethod
    def parse(cls, text: str) -> WeightKind:
        """Reads ``"sp50w8a8"``, or ``"bs32x32w8a8:75%"`` where three quarters of the blocks are zero.

        Raises:
            ValueError: not a scheme, or a share that is none.
        """
        name, colon, share = text.partition(":")
        scheme = Scheme.parse(name)
        if not colon:
            return cls(scheme)
        return cls(scheme, Pattern.parse(f"{scheme.sparsity}:{share}").zeros)  # its grammar has shares of blocks alone

    def __str__(self) -> str:
        blocks = isinstance(self.scheme.sparsity, Block)
        return f"{self.scheme}:{self.zero_blocks:.0%}" if blocks else str(self.scheme)

    @property
    def pattern(self) -> Pattern | None:
        """Which weights are zero; None: all are stored."""
        sparsity = self.scheme.sparsity
        if sparsity is None:
            return None
        return Pattern(sparsity, self.zero_blocks if isinstance(sparsity, Block) else sparsity.zeros)

    def draw(self, n: int, k: int) -> QuantizedWeight:
        """A random weight (n, k), the same every time. None of what is kept is zero by accident, as a sixteenth of
        random 4-bit codes would be, but for the weights of pruning, which are the large ones, hardly any are."""
        if self.scheme.sparsity is None:
            return random_weight(self.scheme, n, k)
        dense = random_weight(self.scheme.dense, n, k)
        kept = random_mask(self.scheme, n, k, torch.Generator().manual_seed(1), self.zero_blocks)
        if self.scheme.weight_bits == 8:
            codes = dense.qweight.where(dense.qweight != 0, 1)
            return QuantizedWeight(codes * kept, dense.scale)
        codes = unpack_nibbles(dense.qweight, k)
        return QuantizedWeight(pack_nibbles(codes.where(codes != 8, 9).where(kept, 8)), dense.scale)
