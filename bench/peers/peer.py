"""The interface of a peer: a linear layer of another library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

# The pool shared by torch, nybble and all libraries that link libgomp.so.1.
OPENMP = "openmp"
# x (M, K) -> y (M, N), a tensor or a numpy array
Layer = Callable[[Tensor], object]


@dataclass(frozen=True)
class Peer:
    """A linear layer of another library.

    make: takes a float32 weight (N, K), the dtype of the activations and a number of copies; returns that many layers with
        separate copies of the weight, which use torch.get_num_threads() threads. Raises RuntimeError or ValueError for
        what the library does not support.
    multiply: type of its multiply, as documented: "int8", "bf16" or "fp32".
    dtypes: activation dtypes that it supports without conversion. For others it gets the first; the conversion is not
        timed.
    pool: the thread pool it uses. Threads of a pool spin for a while after a call, and disturb other pools.
    needs: modules that must be installed, by pip install and `install`.
    sparse: prefix of the names of sparsity patterns that it supports, "sp" or "bs32x32"; None: it is dense.
    refused: why it takes no part in this run; None: it does.
    size: bytes that it stores for a sparse weight (N, K); None: weight_bits per weight, without scales.
    """

    name: str
    weight_bits: int
    multiply: str
    dtypes: tuple[torch.dtype, ...]
    make: Callable[[Tensor, torch.dtype, int], list[Layer]]
    pool: str = OPENMP
    needs: tuple[str, ...] = ()
    install: str = "'nybble[peers]'"
    sparse: str | None = None
    size: Callable[[Tensor], int] | None = None
    refused: str | None = None

    def why_not(self) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.refused is not None:
            return self.refused
        absent = [name for name in self.needs if find_spec(name) is None]
        return f"{' and '.join(absent)} not installed (pip install {self.install})" if absent else None

    def weight_bytes(self, weight: Tensor) -> int:
        """Bytes that it stores for a weight (N, K)."""
        return max(1, self.size(weight) if self.size else weight.numel() * self.weight_bits // 8)

    def takes(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the activations that it gets when `dtype` is requested."""
        return dtype if dtype in self.dtypes else self.dtypes[0]
