"""Launches of Triton kernels again, at other addresses. Python's part of a call is most of a small product's time, and
Triton binds, specialises and looks up a kernel at every launch, which takes 8 us.

So the launches of a plan's first call for a number of rows are recorded: compiled kernels, grids and arguments. Later
calls launch them again, as compiled[grid](*arguments) (see Triton's tutorial on fused softmax), with the addresses of
their own tensors. Code is compiled for addresses that are multiples of 16, as the recorded ones are: a call with another
address, or with other strides, is launched through Triton as the first one was.
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

# Recorded calls that a plan keeps.
_MOST = 1024
# Of a block of scratch: what Triton's loads and stores may want of an address, and a line of the cache.
_ALIGNMENT = 128
# Where the 0 stands among the addresses of a call.
_ZERO = 5
Places = Callable[[tuple[int, ...]], tuple[int, ...]]


def _public_device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else -1


# The current device's number, and where there is none -1, as tensors of the CPU say; torch's own short way where this
# torch has it.
device_of: Callable[[], int] = (
    getattr(torch._C, "_cuda_getDevice", _public_device) if torch.cuda.is_available() else _public_device
)


class Launch(NamedTuple):
    """A launch that was made: what Triton compiled (None: nothing), the grid, and all arguments in the kernel's order."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


@lru_cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


_launches: ContextVar[list[Launch] | None] = ContextVar("launches", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """kernel[grid](*arguments, **named), noted where a recording is on."""
    compiled = kernel[grid](*arguments, **named)
    if (made := _launches.get()) is not None:
        signature = _signature(kernel.fn)
        constants = {name: value for name, value in named.items() if name in signature.parameters}
        bound = signature.bind(*arguments, **constants)
        x, y, z = (*grid, 1, 1)[:3]
        made.append(Launch(compiled, (x, y, z), tuple(bound.arguments.values())))


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """The launches that are made within."""
    made: list[Launch] = []
    token = _launches.set(made)
    try:
        yield made
    finally:
        _launches.reset(token)


class Replay:
    """Recorded launches, of which x, packed, bias, out and scratch may lie elsewhere."""

    def __init__(self, launches: list[Launch], tensors: tuple[Tensor | None, ...]) -> None:
        """tensors: x, packed, bias, out as they were recorded; every other tensor of a launch is scratch."""
        self.nbytes = 0
        self._scratch: dict[int, int] = {}  # from storages to their places in a block of scratch
        self._launches = [(made.compiled[made.grid], *self._split(made, tensors)) for made in launches]

    @classmethod
    def of(cls, launches: list[Launch], tensors: tuple[Tensor | None, ...]) -> Replay | None:
        """None where nothing was compiled (Triton's interpreter), or the tensors share memory: which is which?"""
        spans = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in tensors if one is not None)
        overlap = any(before[1] > after[0] for before, after in pairwise(spans))
        return None if overlap or any(made.compiled is None for made in launches) else cls(launches, tensors)

    def _split(self, made: Launch, tensors: tuple[Tensor | None, ...]) -> tuple[Places, list[int], tuple[Any, ...]]:
        """The arguments up to the last tensor, as what of `addresses` begins them and how far they lie beyond, and the
        others as they are. Numbers begin at 0, and so does None, which Triton has compiled in and reads no more."""
        last = max(i for i, value in enumerate(made.arguments) if isinstance(value, Tensor))
        begins, beyond = [], []
        for value in made.arguments[: last + 1]:
            begin, offset = self._place(value, tensors) if isinstance(value, Tensor) else (_ZERO, value or 0)
            begins.append(begin)
            beyond.append(offset)
        return itemgetter(*begins), beyond, made.arguments[last + 1 :]

    def _place(self, argument: Tensor, tensors: tuple[Tensor | None, ...]) -> tuple[int, int]:
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
        """addresses: of x, packed, bias, out, of `nbytes` of scratch, and 0."""
        for launcher, begins, beyond, rest in self._launches:
            launcher(*map(add, begins(addresses), beyond), *rest, stream=stream)


class ReplayedPlan:
    """A plan, with native.LinearPlan's convention, that launches Triton kernels and nothing else; which, and on how much
    scratch, depends on shapes and dtypes alone. A subclass has `launch`, which makes the launches the usual way."""

    def __init__(self, scheme: Scheme, out_features: int, in_features: int) -> None:
        scheme.check_shape(out_features, in_features)
        self._shape = (scheme, out_features, in_features)
        self._replays: dict[tuple[Any, ...], Replay] = {}

    def launch(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (..., N) = x (..., K) w^T + bias."""
        raise NotImplementedError

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (..., N), contiguous, = x (..., K) w^T + bias. A packed weight that begins at no multiple of 16 bytes is
        copied, with a warning.

        Raises:
            ValueError: packed is on another device than x, or smaller than its shape says.
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
        # Of torch at each call: its memory belongs to the stream, or to the graph that is captured.
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
