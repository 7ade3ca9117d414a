"""Records the Triton launches of a call and replays them with other tensors. Host time dominates small products: Triton
binds, specialises and looks up a kernel at every launch, which takes 8 us.

The launches of a plan's first call for a number of rows are recorded: compiled kernels, grids and arguments. Later calls
run compiled[grid](*arguments) directly (see Triton's tutorial on fused softmax) with the addresses of their own tensors.
The code was compiled for addresses that are multiples of 16 and contiguous x: other calls go through Triton's launcher.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import pairwise
from operator import add, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import layouts
from ..dispatch import native_cuda
from ..weights.scheme import Scheme

# Largest number of recorded calls per plan.
_MOST = 1024
# Alignment of scratch buffers: a cache line, more than Triton's loads and stores need.
_ALIGNMENT = 128
# Index of the constant 0 among the addresses of a call.
_ZERO = 5
Bases = Callable[[tuple[int, ...]], tuple[int, ...]]


def _public_device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else -1


# Index of the current device, or -1 without one, as get_device() of a CPU tensor returns. Uses torch's faster private
# function where it exists.
device_of: Callable[[], int] = (
    getattr(torch._C, "_cuda_getDevice", _public_device) if torch.cuda.is_available() else _public_device
)


class Launch(NamedTuple):
    """A recorded launch: the compiled kernel (None in the interpreter), the grid, all arguments in signature order."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


@lru_cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


_launches: ContextVar[list[Launch] | None] = ContextVar("launches", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """Runs kernel[grid](*arguments, **named); inside `recording`, also records it."""
    compiled = kernel[grid](*arguments, **named)
    if (made := _launches.get()) is not None:
        signature = _signature(kernel.fn)
        constants = {name: value for name, value in named.items() if name in signature.parameters}
        bound = signature.bind(*arguments, **constants)
        x, y, z = (*grid, 1, 1)[:3]
        made.append(Launch(compiled, (x, y, z), tuple(bound.arguments.values())))


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Yields a list that receives the launches made inside the context."""
    made: list[Launch] = []
    token = _launches.set(made)
    try:
        yield made
    finally:
        _launches.reset(token)


class Replay:
    """Recorded launches that can run with another x, packed, bias, out and scratch buffer."""

    def __init__(self, launches: list[Launch], tensors: tuple[Tensor | None, ...]) -> None:
        """tensors: x, packed, bias, out of the recorded call; every other tensor of a launch is scratch."""
        self.nbytes = 0
        self._scratch: dict[int, int] = {}  # address of a storage -> its offset in the scratch buffer
        self._launches = [(made.compiled[made.grid], *self._split(made, tensors)) for made in launches]

    @classmethod
    def of(cls, launches: list[Launch], tensors: tuple[Tensor | None, ...]) -> Replay | None:
        """None if nothing was compiled (Triton's interpreter), or if the tensors overlap and so cannot be told apart."""
        spans = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors if one is not None)
        overlap = any(before[1] > after[0] for before, after in pairwise(spans))
        return None if overlap or any(made.compiled is None for made in launches) else cls(launches, tensors)

    def _split(self, made: Launch, tensors: tuple[Tensor | None, ...]) -> tuple[Bases, list[int], tuple[Any, ...]]:
        """Splits the arguments after the last tensor. Each one up to it becomes base address + offset; the rest stay as
        they are. A number is 0 + itself, and None is 0: Triton compiled it in and ignores the argument."""
        last = max(i for i, value in enumerate(made.arguments) if isinstance(value, Tensor))
        bases, offsets = [], []
        for value in made.arguments[: last + 1]:
            base, offset = self._base(value, tensors) if isinstance(value, Tensor) else (_ZERO, value or 0)
            bases.append(base)
            offsets.append(offset)
        return itemgetter(*bases), offsets, made.arguments[last + 1 :]

    def _base(self, argument: Tensor, tensors: tuple[Tensor | None, ...]) -> tuple[int, int]:
        """Index of the argument's base among the addresses of a call, and its offset from there."""
        address = argument.data_ptr()
        for i, one in enumerate(tensors):
            if one is not None and one.data_ptr() <= address < one.data_ptr() + one.nbytes:
                return i, address - one.data_ptr()
        storage = argument.untyped_storage()
        if storage.data_ptr() not in self._scratch:
            self._scratch[storage.data_ptr()] = self.nbytes
            self.nbytes += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        return len(tensors), self._scratch[storage.data_ptr()] + address - storage.data_ptr()

    def run(self, addresses: tuple[int, int, int, int, int, int], stream: int) -> None:
        """addresses: x, packed, bias, out, a scratch buffer of `nbytes` bytes, and the constant 0."""
        for launcher, bases, offsets, rest in self._launches:
            launcher(*map(add, bases(addresses), offsets), *rest, stream=stream)


class ReplayedPlan:
    """Base of plans that run Triton kernels only, called like native.LinearPlan. The launches and their scratch must depend
    on shapes and dtypes alone. A subclass implements `launch` with ordinary launches."""

    def __init__(self, scheme: Scheme, out_features: int, in_features: int) -> None:
        scheme.check_shape(out_features, in_features)
        self._shape = (scheme, out_features, in_features)
        self._replays: dict[tuple[Any, ...], Replay] = {}

    def launch(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes x (..., K) w^T + bias to out (..., N)."""
        raise NotImplementedError

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes x (..., K) w^T + bias to out (..., N), contiguous. A packed weight whose address is not a multiple of 16
        is copied, with a warning.

        Raises:
            ValueError: packed is on another device than x, or too small for its shape.
        """
        device = x.get_device()
        if packed.get_device() != device:
            raise ValueError(f"packed: on {packed.device}, x is on {x.device}")
        weight = packed.data_ptr()
        if weight & 15:
            packed = layouts.aligned(packed)
            weight = packed.data_ptr()
        at, to, term = x.data_ptr(), out.data_ptr(), 0 if bias is None else bias.data_ptr()
        if (at | to | term) & 15 or not x.is_contiguous() or device != device_of():
            return self.launch(x, packed, bias, out)
        key = (x.numel(), x.dtype, out.dtype, None if bias is None else bias.dtype, packed.numel(), device)
        replay = self._replays.get(key)
        if replay is None:
            return self._record(key, x, packed, bias, out)
        # Allocated by torch at each call, so that the memory belongs to the current stream or the captured CUDA graph.
        scratch = x.new_empty(replay.nbytes, dtype=torch.uint8) if replay.nbytes else None
        addresses = (at, weight, term, to, 0 if scratch is None else scratch.data_ptr(), 0)
        return replay.run(addresses, native_cuda.stream_of(device))

    def _record(self, key: tuple[Any, ...], x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        with recording() as launches:
            self.launch(x, packed, bias, out)
        if (replay := Replay.of(launches, (x, packed, bias, out))) is not None:
            if len(self._replays) >= _MOST:
                del self._replays[next(iter(self._replays))]  # the oldest
            self._replays[key] = replay
