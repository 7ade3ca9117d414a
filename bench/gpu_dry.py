"""Dry runs of the GPU commands on a machine without a GPU: the CPU, small shapes, constant times, and the reference
instead of the CUDA kernels. Triton kernels are interpreted (TRITON_INTERPRET=1). The times printed by a dry run are not
measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..dispatch import reference
from ..weights.scheme import Scheme
from . import gpu_measure, gpu_timing
from .gpu_timing import Call, Sample

# Dtypes that Triton's interpreter handles correctly: it truncates bfloat16 values on store, and multiplies them wrongly.
INTERPRETED = (torch.float16,)
GPU = {"gpu": "no GPU: a dry run", "capability": "0.0", "multiprocessors": 0}
INSTANCES: tuple[dict[str, Any], ...] = (
    {"kernel": "dry run", "instance": "dry run", "shared_bytes": 73728, "registers": 96, "blocks_per_sm": 3,
     "clusters": {"1": 396, "3": 132}},
)  # fmt: skip


class FromReference:
    """A plan, called like native_cuda.CudaPlan, that unpacks the weight and computes with the reference.

    rounds: the dtype to which float32 activations are rounded, as in KernelSpec.
    """

    def __init__(
        self, layout: str, scheme: Scheme, out_features: int, in_features: int, rounds: torch.dtype | None = None
    ) -> None:
        self._shape, self._rounds = (layout, scheme, out_features, in_features), rounds

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        layout, scheme, n, k = self._shape
        if x.dtype is torch.float32 and self._rounds is not None:
            x = x.to(self._rounds)
        out.copy_(reference.linear(x, ops.unpack(packed, layout, scheme, n, k), bias, scheme, out.dtype))


def smaller(m: int, n: int, k: int) -> tuple[int, int, int]:
    """A reduced shape that a CPU multiplies quickly; K stays a multiple of 1024 or 128."""
    return min(m, 24), min(n, 128), min(k, 1024 if k % 1024 == 0 else 128)


def _in_graph(calls: Sequence[Call], replays: int = gpu_timing.REPLAYS) -> Sample:
    for call in calls:
        call()
    return Sample(1.0, 0.9, 1.1)


def _once(call: Call, count: int = 1) -> float:
    call()
    return 1.0


@contextmanager
def stand_in() -> Iterator[None]:
    """While active, timing functions run each call once on the CPU and report one microsecond."""
    changes: tuple[tuple[Any, str, Any], ...] = (
        (gpu_timing, "in_graph", _in_graph),
        *((gpu_timing, name, _once) for name in ("first", "eager", "host")),
        (gpu_timing, "copies", lambda nbytes: 2),
        (gpu_measure, "DEVICE", "cpu"),
        (gpu_measure, "ceilings", partial(gpu_measure.ceilings, 64, 1 << 16)),
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
