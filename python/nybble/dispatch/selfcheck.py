"""The self-check: a kernel for GPUs, or of a plug-in, is compared with the reference on small weights before its first use.

A kernel that disagrees, or that the compiler or driver refuses, is left out from then on, with a warning. The next
kernel takes its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product
from time import monotonic

import torch
from torch import Tensor

from .. import layouts
from ..weights.rounding import QuantizedWeight, quantize_weight
from ..weights.scheme import Scheme, numbers_of
from ..weights.sparsity import Block, NofM, Sparsity, Unstructured
from . import reference, targets
from .spec import DISTRUSTED, KernelSpec

# (outputs, inputs) of the weights: less than a tile and several tiles; K split in 2, in an odd number of uneven parts,
# and in 8, the most of a cluster.
_SHAPES = ((72, 1096), (300, 2600), (320, 4096))
# For the targets with wide tiles: so many outputs that they choose wide tiles, and a block computes several in turn.
_WIDE = (8456, 392)
# The fewest rows of activations for each size of a block; the most that are tried; and, of a kernel for many rows, how
# many more than its fewest fill another block.
_ROWS, _MOST_ROWS, _MORE_ROWS = (9, 17, 33), 192, 129
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = Block(32, 32)
# The largest error, relative to the largest output.
_TOLERANCE = 0.02
# Seconds until a comparison is tried again that could not be made.
_RETRY = 10.0

# Names of the kernels that were compared, and the time from which others may be tried again.
_compared: set[str] = set()
_not_before: dict[str, float] = {}


class CheckLaterError(RuntimeError):
    """A kernel could not be compared for a reason that is not its fault, such as full memory."""


def pending(spec: KernelSpec) -> bool:
    """Whether a kernel has yet to be compared: one for this machine's GPU, or of a plug-in for any device."""
    if spec.name in _compared:
        return False
    return torch.cuda.is_available() if spec.device == "cuda" else spec.from_plugin


def check(spec: KernelSpec) -> bool:
    """Compares a pending kernel, once. One that disagrees is added to spec.DISTRUSTED, with a warning.

    It waits for the device, so no kernel for GPUs is compared while a CUDA graph is captured.

    Returns:
        Whether the kernel was compared. If not, it may be used now, and must be checked again at its next use.
    """
    if not pending(spec):
        return True
    device = spec.device or "cpu"
    capturing = device == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing or monotonic() < _not_before.get(spec.name, 0):
        return False
    try:
        reason = disagreement(spec, device)
    except CheckLaterError as error:
        if spec.name not in _not_before:
            _warn(f"{spec.name} is used before it was compared with the reference: {error}")
        _not_before[spec.name] = monotonic() + _RETRY
        return False
    if reason is not None:
        DISTRUSTED[spec.name] = reason
        _warn(f"{spec.name} is not used: {reason}")
    _compared.add(spec.name)
    return True


def disagreement(spec: KernelSpec, device: str) -> str | None:
    """What is wrong with the outputs of a kernel; None: nothing.

    A kernel is compared for every dtype of activations, each kind of scheme, several shapes and numbers of rows. One that
    is compiled anew for each of these is compared for the first of each: twice, since the second call launches the
    compiled kernel in another way.

    Raises:
        CheckLaterError: memory is full, or a CUDA graph is being captured.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        # The caller's default device may be another.
        with torch.no_grad(), torch.device("cpu"):
            reasons = (_compare(spec, scheme, shape, generator, device) for scheme, shape in _weights(spec))
            return next((reason for reason in reasons if reason is not None), None)
    except Exception as error:
        # Compilers and drivers raise exceptions of many types; each is the reason against the kernel.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "captur" in str(error):
            raise CheckLaterError(lines[0]) from error
        return lines[0]


def schemes(spec: KernelSpec) -> list[Scheme]:
    """The schemes that a kernel is compared for: the smallest groups with zero points, the largest without."""
    kind, act_bits = numbers_of(spec.scheme)
    sparsity = _sparsity(spec)
    sizes = [size for size in spec.sizes() if size is not None]
    found = [Scheme(kind.bits, act_bits, max(sizes, default=None), sparsity=sparsity, book=kind.book)]
    if kind.zero_point is not None and sparsity is None:
        found.insert(0, Scheme(kind.bits, act_bits, min(sizes, default=None), symmetric=False, book=kind.book))
    return [scheme for scheme in found if spec.serves(scheme)]


def _sparsity(spec: KernelSpec) -> Sparsity | None:
    """The pattern of zeros that a kernel is compared for."""
    if spec.scheme.startswith("bs"):
        return _BLOCK
    if spec.sparsity is not None or not spec.scheme.startswith("sp"):
        return spec.sparsity
    patterns = numbers_of(spec.scheme)[0].patterns
    single = next((pattern for pattern in patterns if isinstance(pattern, NofM)), NofM(2, 4))
    return Unstructured(50) if Unstructured in patterns else single


def _compiles(spec: KernelSpec) -> bool:
    return targets.find(spec.target).compiles_on_first_call


def _weights(spec: KernelSpec) -> Iterator[tuple[Scheme, tuple[int, int]]]:
    every = list(product(schemes(spec), (*_SHAPES, _WIDE) if targets.find(spec.target).wide_tiles else _SHAPES))
    yield from every[:1] if _compiles(spec) else every


def _row_counts(spec: KernelSpec) -> list[int]:
    least, most = spec.m_range
    if _compiles(spec):
        return [least, least]  # the second call launches what the first one compiled
    last = max(_MOST_ROWS, least + _MORE_ROWS)
    return sorted({least, last if most is None else min(most, last), *filter(spec.takes, _ROWS)})


def _compare(
    spec: KernelSpec, scheme: Scheme, shape: tuple[int, int], generator: torch.Generator, device: str
) -> str | None:
    n, k = shape
    weight = torch.randn(n, k, generator=generator, dtype=torch.float32) * _kept(scheme, n, k, generator)
    quantized = quantize_weight(weight, scheme)
    there = QuantizedWeight(**{name: tensor.to(device) for name, tensor in quantized.tensors().items()})
    packed = layouts.pack(there, spec.layout, scheme, k)
    assert spec.make is not None, "linear kernels can run"  # noqa: S101
    plan, counts = spec.make(scheme, n, k), _row_counts(spec)
    dtypes = [dtype for dtype in _DTYPES if dtype in spec.act_dtypes]
    for dtype in dtypes[:1] if _compiles(spec) else dtypes:
        x = torch.randn(counts[-1], k, generator=generator, dtype=torch.float32).to(dtype)
        expected = reference.linear(x, quantized, None, scheme, torch.float64)
        kept = []  # so that each call has tensors at other addresses
        for m in counts:
            out = torch.full((m, n), torch.nan, dtype=dtype, device=device)
            rows, weights = x[:m].to(device), packed.clone()
            plan(rows, weights, None, out)
            kept += [rows, weights, out]
            worst = float((out.cpu().double() - expected[:m]).abs().max() / expected[:m].abs().max())
            if not worst <= _TOLERANCE:
                of = f"{m} rows and ({n}, {k}) weights of {scheme}"
                return f"its {str(dtype).removeprefix('torch.')} outputs for {of} are off by {worst:.2g} of the largest"
    return None


def _kept(scheme: Scheme, n: int, k: int, generator: torch.Generator) -> Tensor:
    """Which weights are not zero, bool (N, K), at random: half of the blocks, n of each m, a share, or all."""
    sparsity = scheme.sparsity
    if isinstance(sparsity, Block):
        rows, columns = sparsity.rows, sparsity.columns
        blocks = torch.rand(-(-n // rows), -(-k // columns), generator=generator) < 0.5
        return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:n, :k]
    if isinstance(sparsity, NofM):
        order = torch.rand(n, -(-k // sparsity.m), sparsity.m, generator=generator).argsort(-1)
        return order.lt(sparsity.n).flatten(1)[:, :k]
    if sparsity is not None:
        return torch.rand(n, k, generator=generator) >= sparsity.zeros
    return torch.ones(n, k, dtype=torch.bool)


def _warn(what: str) -> None:
    warnings.warn(f"nybble: {what}", RuntimeWarning, stacklevel=3)
