"""What a peer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

# The pool that torch, nybble and whatever links libgomp.so.1 share.
OPENMP = "openmp"
# x (M, K) -> y (M, N), a tensor or a numpy array
Layer = Callable[[Tensor], object]


@dataclass(frozen=True)
class Peer:
    """A linear layer of another library.

    make: from a weight (N, K), float32, the dtype of the activations and a number of copies to that many layers whose
        weights lie apart in memory. They run on torch.get_num_threads() threads, as it was when they were made. It
        raises RuntimeError or ValueError for what the library cannot do.
    multiply: what its products are computed in, as far as it says: "int8", "bf16" or "fp32".
    dtypes: activations that it takes without converting them; where the dtype asked for is not among them it gets the
        first. The conversion is not on its clock.
    pool: whose threads it runs on. Pools spin for a while after a call, and disturb those of others.
    needs: modules that must be installed.
    sparse: how the names of the patterns start that it is for, "sp" or "bs32x32"; None: it stores every weight.
    size: bytes of what it stores of a sparse weight (N, K); None: weight_bits of each, scales not counted.
    """

    name: str
    weight_bits: int
    multiply: str
    dtypes: tuple[torch.dtype, ...]
    make: Callable[[Tensor, torch.dtype, int], list[Layer]]
    pool: str = OPENMP
    needs: tuple[str, ...] = ()
    sparse: str | None = None
    size: Callable[[Tensor], int] | None = None

    def why_not(self) -> str | None:
        """Why it cannot run here; None if it can."""
        absent = [name for name in self.needs if find_spec(name) is None]
        return f"{' and '.join(absent)} not installed (pip install 'nybble[peers]')" if absent else None

    def weight_bytes(self, weight: Tensor) -> int:
        """Bytes of a weight (N, K) as it is stored."""
        return max(1, self.size(weight) if self.size else weight.numel() * self.weight_bits // 8)

    def takes(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the activations that it gets where `dtype` is asked for."""
        return dtype if dtype in self.dtypes else self.dtypes[0]
