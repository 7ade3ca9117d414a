"""The CUDA kernels: tensors in, device addresses out. The only module that imports `_cuda`, and only where torch has a
GPU: the extension brings its own runtime, and finds the driver when it is first called."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from .. import __version__, layouts
from ..native import DTYPES, memory
from ..weights.scheme import Scheme

# csrc/cuda/abi.h: the group of k is k >> shift.
_SHIFTS = {None: 31, 32: 5, 64: 6, 128: 7}
# By the number of a dtype.
_ITEM_BYTES = {number: dtype.itemsize for dtype, number in DTYPES.items()}


def _public_stream(device: int) -> int:
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


# The handle of a device's current stream: torch's own short way where this torch has it, which makes no Stream object.
stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)


@lru_cache
def _extension() -> Any:
    from .. import _cuda

    if _cuda.version != __version__:
        raise ImportError(f"nybble {__version__} found CUDA kernels of version {_cuda.version}: reinstall it")
    return _cuda


def instances(device: int) -> list[dict[str, Any]]:
    """Of each instance of each kernel what the driver gives it on a device: its shared memory and registers, the blocks
    that a multiprocessor holds at once, and the clusters that are active at once by the number of blocks of one.

    Raises:
        RuntimeError: CUDA refuses; the message says why.
    """
    found: list[dict[str, Any]] = _extension().instances(device)
    return found


class CudaPlan:
    """A CUDA kernel bound to a scheme and a weight shape, with native.LinearPlan's convention.

    It runs on x's device and its current stream, never waits for the device, and takes its scratch from torch, so that it
    can be captured in a CUDA graph. Kernels of 16-bit activations round float32 ones to bfloat16.
    """

    def __init__(self, kernel: str, layout: str, scheme: Scheme, out_features: int, in_features: int) -> None:
        scheme.check_shape(out_features, in_features)
        self._kernel, self._layout, self._scheme = kernel, layout, scheme
        self._n, self._k = out_features, in_features
        self._floats = scheme.act_bits == 16
        self._bound: dict[int, _Bound] = {}

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (..., N), contiguous, = x (..., K) w^T + bias.

        x is contiguous, or (M, K) with unit stride along K. A packed weight that begins at no multiple of 16 bytes is
        copied, with a warning.

        Raises:
            ValueError: a tensor is smaller than its shape says, or packed is on another device than x.
            RuntimeError: CUDA refuses the launch; the message has its reason.
        """
        device, k = x.get_device(), self._k
        if packed.get_device() != device:
            raise ValueError(f"packed: on {packed.device}, x is on {x.device}")
        weight = packed.data_ptr()
        if weight & 15:
            packed = layouts.aligned(packed)
            weight = packed.data_ptr()
        count, stride, dtype, address = x.numel(), k, x.dtype, x.data_ptr()
        # Each question to a tensor costs as much as a line of Python: what follows from another is not asked.
        if x.is_contiguous() and not (self._floats and (address & 15 or k & 7 or dtype is torch.float32)):
            kind = DTYPES[dtype]
            nbytes = count * _ITEM_BYTES[kind]
        else:
            x, stride = self._rows(x)
            kind, (address, nbytes) = DTYPES[x.dtype], memory(x)
        run, scratch_of = self._bound.get(device) or self._bind(device)
        m = count // k
        size = scratch_of(m)
        # Of torch at each call: its memory belongs to the stream, or to the graph that is captured.
        scratch = x.new_empty(size, dtype=torch.uint8) if size else None
        term = term_bytes = term_kind = 0
        if bias is not None:
            term, term_bytes, term_kind = bias.data_ptr(), bias.nbytes, DTYPES[bias.dtype]
        run(
            address,
            nbytes,
            kind,
            m,
            stride,
            weight,
            packed.numel(),
            term,
            term_bytes,
            term_kind,
            out.data_ptr(),
            out.nbytes,
            DTYPES[out.dtype],
            0 if scratch is None else scratch.data_ptr(),
            size,
            stream_of(device),
        )

    def _rows(self, x: Tensor) -> tuple[Tensor, int]:
        """x as rows that the kernel takes, copied where it must be, and their stride."""
        rows = x.reshape(-1, self._k)
        if self._floats:
            rows = _aligned(rows if rows.dtype is not torch.float32 else rows.to(torch.bfloat16))
        return rows, rows.stride(0) if len(rows) > 1 else -(-self._k // 8) * 8

    def _bind(self, device: int) -> _Bound:
        n, k = layouts.padded(self._layout, self._scheme, self._n, self._k)
        offsets = layouts.offsets(self._layout, self._scheme, self._n, self._k)
        sums = "column_sum" if self._layout == "rows8" else "weight_sum"
        names = ("codes", "scale", "zero_point", sums, "places")
        plan = _extension().Plan(
            kernel=self._kernel,
            device=device,
            n=self._n,
            k=self._k,
            n_padded=n,
            k_padded=k,
            group_shift=_SHIFTS[self._scheme.group_size],
            offsets=[*(offsets.get(name, -1) for name in names), offsets[""]],
        )
        return self._bound.setdefault(device, _Bound(plan.run, lru_cache(maxsize=1024)(plan.scratch)))


class _Bound(NamedTuple):
    """A plan on one device: what launches it, and the bytes of scratch that it wants for a number of rows."""

    run: Callable[..., None]
    scratch: Callable[[int], int]


def _aligned(rows: Tensor) -> Tensor:
    """Rows that start at multiples of 16 bytes, copied where they do not: odd shapes and slices."""
    k = rows.shape[1]
    if rows.data_ptr() % 16 == 0 and (rows.stride(0) % 8 == 0 if len(rows) > 1 else k % 8 == 0):
        return rows
    return zero_pad(rows, (0, -k % 8))[:, :k] if k % 8 else rows.clone(memory_format=torch.contiguous_format)
