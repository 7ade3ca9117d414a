"""The CUDA kernels: tensors in, device addresses out. The only module that imports the extension `_cuda`.

It does so at the first call, where torch has a GPU. The extension brings its own CUDA runtime, which finds the driver
when it is first called.
"""

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

# By group size: the group of input k is k >> shift, see csrc/cuda/abi.h.
_SHIFTS = {None: 31, 32: 5, 64: 6, 128: 7}
# By the number of a dtype in csrc/abi.h.
_ITEM_BYTES = {number: dtype.itemsize for dtype, number in DTYPES.items()}


def _public_stream(device: int) -> int:
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


# The handle of a device's current stream. torch's private function is faster, since it makes no Stream object.
stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)


@lru_cache
def _extension() -> Any:
    from .. import _cuda

    if _cuda.version != __version__:
        raise ImportError(f"nybble {__version__} found CUDA kernels of version {_cuda.version}: reinstall it")
    return _cuda


def instances(device: int) -> list[dict[str, Any]]:
    """The resources of each instance of each kernel on a device: shared memory, registers, blocks at once on a
    multiprocessor, and active clusters by their size.

    Raises:
        RuntimeError: a CUDA error.
    """
    found: list[dict[str, Any]] = _extension().instances(device)
    return found


class CudaPlan:
    """A CUDA kernel for a scheme and a weight shape. It is called like native.LinearPlan.

    It runs on the device of x, on the current stream, and never waits for the device. It allocates scratch memory from
    torch, so a CUDA graph can capture it. Kernels for float activations round float32 ones to bfloat16.
    """

    def __init__(self, kernel: str, layout: str, scheme: Scheme, out_features: int, in_features: int) -> None:
        scheme.check_shape(out_features, in_features)
        self._kernel, self._layout, self._scheme = kernel, layout, scheme
        self._n, self._k = out_features, in_features
        self._floats = scheme.act_bits == 16
        self._bound: dict[int, _Bound] = {}

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (..., N), contiguous, = x (..., K) w^T + bias.

        x is contiguous, or (M, K) with unit stride along K. A packed weight at an address that is not a multiple of 16
        is copied, with a warning.

        Raises:
            ValueError: a tensor is smaller than its shape says, or packed is on another device than x.
            RuntimeError: a CUDA error at the launch.
        """
        device, k = x.get_device(), self._k
        if packed.get_device() != device:
            raise ValueError(f"packed: on {packed.device}, x is on {x.device}")
        weight = packed.data_ptr()
        if weight & 15:
            packed = layouts.aligned(packed)
            weight = packed.data_ptr()
        count, stride, dtype, address = x.numel(), k, x.dtype, x.data_ptr()
        # Each attribute of a tensor costs as much as a line of Python, so none is read that follows from another.
        if x.is_contiguous() and not (self._floats and (address & 15 or k & 7 or dtype is torch.float32)):
            kind = DTYPES[dtype]
            nbytes = count * _ITEM_BYTES[kind]
        else:
            x, stride = self._rows(x)
            kind, (address, nbytes) = DTYPES[x.dtype], memory(x)
        run, scratch_of = self._bound.get(device) or self._bind(device)
        m = count // k
        size = scratch_of(m)
        # Allocated at each call, so that it belongs to the stream, or to the graph that is being captured.
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
        """x as rows that the kernel takes, copied if necessary, and their stride."""
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
    """A plan on one device: its launcher, and the bytes of scratch memory for a number of rows."""

    run: Callable[..., None]
    scratch: Callable[[int], int]


def _aligned(rows: Tensor) -> Tensor:
    """Rows that start at multiples of 16 bytes: copied if they do not, as with odd shapes and slices."""
    k = rows.shape[1]
    if rows.data_ptr() % 16 == 0 and (rows.stride(0) % 8 == 0 if len(rows) > 1 else k % 8 == 0):
        return rows
    return zero_pad(rows, (0, -k % 8))[:, :k] if k % 8 else rows.clone(memory_format=torch.contiguous_format)
