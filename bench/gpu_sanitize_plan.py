"""Records the launches that gpu_sanitize runs, as JSON: each CUDA kernel at a few shapes, with the contents of its inputs.

    python -m nybble.bench.gpu_sanitize_plan FILE [--dry-run]

Calls to the extension are recorded instead of run, with the contents of memory in place of addresses. --dry-run: include
kernels that were not built.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import native
from ..dispatch import native_cuda
from ..dispatch.registry import all_specs
from ..dispatch.spec import KernelSpec
from . import gpu_weights
from .gpu_smoke_check import Case, schemes
from .weights import WeightKind

Row = dict[str, Any]
# Outputs and inputs with partial tiles and split-K; rows beyond the kernel's minimum.
N, K, MORE = 72, 1096, 8
# For wgmma kernels: outputs, inputs, and rows beyond the minimum, such that a GPU with 132 multiprocessors uses wide
# tiles, and several per block.
WIDE_N, WIDE_K, WIDE_MORE = 8456, 136, 129
# Scratch size used while recording, recognizable among the arguments; gpu_sanitize allocates the real size.
SCRATCH = 8 * 12343
# The target of kernels with persistent blocks.
_PERSISTENT = "sm90"
# Integers from here on are addresses.
_ADDRESS = 1 << 40


class Recorder:
    """Replaces an object of the extension; records how it is created and called."""

    def __init__(self, noted: list[Row], what: str, **made: Any) -> None:
        self._noted, self._row = noted, {"class": what, "made": made, "scratch": []}

    def scratch(self, *arguments: Any) -> int:
        """Like Plan.scratch."""
        self._row["scratch"] = list(arguments)
        return SCRATCH

    def run(self, *arguments: Any) -> None:
        """Like Plan.run."""
        self._noted.append({**self._row, "run": list(_contents(arguments))})


def _contents(arguments: Sequence[int]) -> Iterator[Any]:
    """The arguments of a call, with each (address, size) replaced by {"bytes": contents}, or by {} for scratch memory.

    Raises:
        ValueError: an address is not followed by a size.
    """
    rest = iter(arguments)
    for value in rest:
        if value < _ADDRESS:
            yield value
            continue
        nbytes = next(rest, 0)
        if not 0 < nbytes < _ADDRESS:
            raise ValueError(f"argument {value:#x}: an address must be followed by its size in bytes")
        yield {} if nbytes == SCRATCH else {"bytes": base64.b64encode(ctypes.string_at(value, nbytes)).decode()}


class _Extension:
    """Replaces the extension."""

    def __init__(self, noted: list[Row]) -> None:
        self._noted = noted

    def __getattr__(self, name: str) -> Any:
        return lambda **made: Recorder(self._noted, name, **made)


@contextmanager
def recording() -> Iterator[list[Row]]:
    """While active, calls of CUDA kernels with CPU tensors are recorded; yields the list of records."""
    noted: list[Row] = []
    before = native_cuda._extension, native_cuda.stream_of
    native_cuda._extension = lambda: _Extension(noted)  # type: ignore[assignment]
    native_cuda.stream_of = lambda device: 0
    try:
        yield noted
    finally:
        native_cuda._extension, native_cuda.stream_of = before


def cases(spec: KernelSpec) -> list[Case]:
    """The cases of a kernel: its minimum number of rows and a few more, with symmetric and asymmetric weights; for
    persistent kernels also several tiles per block, and float32."""
    least, most = spec.m_range
    found, rows = [], sorted({least, min(least + MORE, most or least + MORE)})
    for scheme in schemes(spec)[:2]:
        found += [Case(scheme, torch.bfloat16, m, N, K) for m in rows]
        if spec.target == _PERSISTENT:
            found.append(Case(scheme, torch.bfloat16, least + WIDE_MORE, WIDE_N, WIDE_K))
    if spec.target == _PERSISTENT:
        found.append(Case(found[0].scheme, torch.float32, rows[-1], N, K))
    return found


def launches(specs: Sequence[KernelSpec]) -> list[Row]:
    """The launches of all kernels; those with the most synchronization first, because time may run out."""
    found = []
    for spec in sorted(specs, key=_order):
        for case in cases(spec):
            packed, _ = gpu_weights.packed(WeightKind(case.scheme), spec.layout, case.n, case.k, "cpu")
            x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(case.m)).to(case.dtype)
            out = torch.zeros(case.m, case.n, dtype=x.dtype)
            with recording() as noted:
                assert spec.make is not None, "linear kernels have it"  # noqa: S101
                spec.make(case.scheme, case.n, case.k)(x, packed, None, out)
            found += [{"kernel": spec.name, "case": str(case), **row} for row in noted]
    return found


def _order(spec: KernelSpec) -> tuple[bool, bool]:
    """Sort key: wgmma kernels with asynchronous copies first, kernels with up to 8 rows last."""
    return spec.target != _PERSISTENT, spec.name.endswith("_gemv")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m nybble.bench.gpu_sanitize_plan", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(argv)
    cuda = {row["name"] for row in native.cuda_kernel_table()}
    specs = [spec for spec in all_specs() if spec.name in cuda and (spec.built or options.dry_run)]
    rows = launches(specs)
    options.file.write_text(json.dumps(rows), encoding="utf-8")
    print(f"plan: {len(rows)} launches of {len(specs)} kernels")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
