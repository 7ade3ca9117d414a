"""The compiled extension: tensors in, pointers and byte counts out. The only module that imports `_C`."""

from __future__ import annotations

# torch first: its wheels bring the OpenMP library that the extension then shares.
import torch
from torch import Tensor

from . import _C, __version__
from .rounding import QuantizedWeight, portable_spec
from .scheme import Scheme

if _C.version != __version__:
    raise ImportError(f"nybble {__version__} found a compiled extension of version {_C.version}: reinstall it")
DTYPES = {torch.float32: _C.F32, torch.bfloat16: _C.BF16, torch.float16: _C.F16, torch.int32: _C.S32}
# By the panel number of csrc/abi.h.
PANEL_DTYPES = (torch.float32, torch.int8, torch.int16, torch.uint8, torch.bfloat16)

_NOTHING = (0, 0)


def kernel_table() -> list[dict[str, object]]:
    """The rows of csrc/kernels.def."""
    return _C.kernel_table()


def cpu() -> tuple[str, tuple[str, ...]]:
    """The CPU's brand, and the instruction sets that it and the operating system offer."""
    brand, features = _C.cpu()
    return brand, tuple(features)


def probes() -> list[tuple[str, str, str]]:
    """The rows of csrc/probes.def that were built, slower ones first: name, kind, and why it cannot run here or ""."""
    return _C.probes()


def probe(
    name: str, threads: int, amount: int, *, passes: int = 1, runs: int = 1, huge_pages: bool = False
) -> tuple[float, int]:
    """Seconds of the fastest of `runs`, and the work of a run: bytes read or operations.

    A run is `passes` times `amount` by each thread: bytes, a multiple of 4096, for a probe that reads; rounds else.

    Raises:
        ValueError: an unknown name, one that cannot run here, or a number below its least value.
        MemoryError: the memory to read cannot be had.
    """
    return _C.probe(name, threads=threads, amount=amount, passes=passes, runs=runs, huge_pages=huge_pages)


def memory(tensor: Tensor | None) -> tuple[int, int]:
    """Address of the first element, and the bytes from there to the end of the storage."""
    if tensor is None:
        return _NOTHING
    if tensor.is_contiguous():
        return tensor.data_ptr(), int(tensor.nbytes)
    offset = int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr(), int(tensor.untyped_storage().nbytes()) - offset


def weight_shape(scheme: Scheme, out_features: int, in_features: int) -> _C.WeightShape:
    return _C.WeightShape(
        bits=scheme.weight_bits,
        n=out_features,
        k=in_features,
        group_size=scheme.group_size or 0,
        symmetric=scheme.symmetric,
    )


def pack(quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> Tensor:
    """layouts.pack for the layout that the CPU kernels share, in parallel."""
    shape = weight_shape(scheme, quantized.qweight.shape[0], in_features)
    packed = torch.empty(shape.packed_bytes, dtype=torch.uint8)
    qweight, scale = quantized.qweight.contiguous(), quantized.scale.contiguous()
    zero_point = None if quantized.zero_point is None else quantized.zero_point.contiguous()
    threads = torch.get_num_threads()
    _C.pack(shape, memory(qweight), memory(scale), memory(zero_point), memory(packed), threads)
    return packed


def unpack(packed: Tensor, scheme: Scheme, out_features: int, in_features: int) -> QuantizedWeight:
    """layouts.unpack, in parallel."""
    shape = weight_shape(scheme, out_features, in_features)
    spec = portable_spec(scheme, out_features, in_features)
    parts = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in spec.items()}
    quantized = QuantizedWeight(**parts)
    _C.unpack(
        shape,
        memory(packed),
        memory(quantized.qweight),
        memory(quantized.scale),
        memory(quantized.zero_point),
        torch.get_num_threads(),
    )
    return quantized


class LinearPlan:
    """A compiled linear kernel bound to a scheme and a weight shape."""

    def __init__(self, kernel: str, prepare: str, scheme: Scheme, out_features: int, in_features: int) -> None:
        self._run = _C.LinearPlan(kernel, prepare, weight_shape(scheme, out_features, in_features)).run
        self._in_features = in_features

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out (..., N) = x (..., K) w^T + bias.

        x is contiguous, or (M, K) with unit stride along K; out is contiguous, of x's dtype, or int32 for the
        accumulators of w8a8.

        Raises:
            ValueError: a tensor is smaller than its shape says.
        """
        dtype, k = DTYPES[x.dtype], self._in_features
        if x.is_contiguous():
            span, stride = (x.data_ptr(), x.nbytes), k
        else:
            span, stride = memory(x), x.stride(0)
        self._run(
            span,
            dtype,
            x.numel() // k,
            stride,
            (packed.data_ptr(), packed.nbytes),
            _NOTHING if bias is None else (bias.data_ptr(), bias.nbytes),
            dtype if bias is None else DTYPES[bias.dtype],
            (out.data_ptr(), out.nbytes),
            dtype if out.dtype is x.dtype else DTYPES[out.dtype],
            torch.get_num_threads(),
        )
