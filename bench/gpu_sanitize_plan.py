"""What gpu_sanitize launches, as JSON: each CUDA kernel on a few shapes, with the bytes of what it reads.

    python -m nybble.bench.gpu_sanitize_plan FILE [--dry-run]

The package's own calls are taken down instead of run: the arguments of the extension, with the contents of memory in place
of its address. --dry-run: also of kernels that were not built.
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

from ..dispatch import native_cuda
from ..dispatch.registry import all_specs
from ..dispatch.spec import KernelSpec
from . import gpu_weights
from .gpu_smoke_check import Case, schemes
from .weights import WeightKind

Row = dict[str, Any]
# Outputs and inputs that fill no tile, and K that is split; and how many tokens more than the fewest.
N, K, MORE = 72, 1096, 8
# Of kernels for wgmma: so many outputs, and so many tokens more than the fewest, that a GPU of 132 multiprocessors takes
# their wide tiles, and several in turn.
WIDE_N, WIDE_K, WIDE_MORE = 8456, 136, 129
# Bytes of scratch that the plan gives a kernel while it is taken down: gpu_sanitize gives it what it asks for.
SCRATCH = 8 * 12343
# The target of kernels that take tiles in turn.
_TURNS = "sm90"
# Numbers from here on are addresses of this process.
_ADDRESS = 1 << 40


class Recorder:
    """Stands for an object of the extension: notes how it is made and called."""

    def __init__(self, noted: list[Row], what: str, **made: Any) -> None:
        self._noted, self._row = noted, {"class": what, "made": made, "scratch": []}

    def scratch(self, *arguments: Any) -> int:
        """As Plan.scratch."""
        self._row["scratch"] = list(arguments)
        return SCRATCH

    def run(self, *arguments: Any) -> None:
        """As Plan.run."""
        self._noted.append({**self._row, "run": list(_contents(arguments))})


def _contents(arguments: Sequence[int]) -> Iterator[Any]:
    """Numbers as they are; an address and the bytes behind it, which follow it, as what is there, or as {} of the scratch.

    Raises:
        ValueError: an address is not followed by a number of bytes.
    """
    rest = iter(arguments)
    for value in rest:
        if value < _ADDRESS:
            yield value
            continue
        nbytes = next(rest, 0)
        if not 0 < nbytes < _ADDRESS:
            raise ValueError(f"argument {value:#x}: an address without the number of its bytes")
        yield {} if nbytes == SCRATCH else {"bytes": base64.b64encode(ctypes.string_at(value, nbytes)).decode()}


class _Extension:
    """Stands for the extension."""

    def __init__(self, noted: list[Row]) -> None:
        self._noted = noted

    def __getattr__(self, name: str) -> Any:
        return lambda **made: Recorder(self._noted, name, **made)


@contextmanager
def taking_down() -> Iterator[list[Row]]:
    """Calls of CUDA kernels are noted, into the list that is yielded, for tensors on the CPU."""
    noted: list[Row] = []
    before = native_cuda._extension, native_cuda.stream_of
    native_cuda._extension = lambda: _Extension(noted)  # type: ignore[assignment]
    native_cuda.stream_of = lambda device: 0
    try:
        yield noted
    finally:
        native_cuda._extension, native_cuda.stream_of = before


def cases(spec: KernelSpec) -> list[Case]:
    """Of a kernel: its fewest tokens and a few more, on a symmetric weight and on an asymmetric one; where it may take
    several tiles in turn, enough of them, and float32."""
    least, most = spec.m_range
    found, tokens = [], sorted({least, min(least + MORE, most or least + MORE)})
    for scheme in schemes(spec)[:2]:
        found += [Case(scheme, torch.bfloat16, m, N, K) for m in tokens]
        if spec.target == _TURNS:
            found.append(Case(scheme, torch.bfloat16, least + WIDE_MORE, WIDE_N, WIDE_K))
    if spec.target == _TURNS:
        found.append(Case(found[0].scheme, torch.float32, tokens[-1], N, K))
    return found


def launches(specs: Sequence[KernelSpec]) -> list[Row]:
    """Of each kernel its cases; first those of kernels whose threads depend on each other most, as time may run out."""
    found = []
    for spec in sorted(specs, key=_order):
        for case in cases(spec):
            packed, _ = gpu_weights.packed(WeightKind(case.scheme), spec.layout, case.n, case.k, "cpu")
            x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(case.m)).to(case.dtype)
            out = torch.zeros(case.m, case.n, dtype=x.dtype)
            with taking_down() as noted:
                assert spec.make is not None, "products alone come here"  # noqa: S101
                spec.make(case.scheme, case.n, case.k)(x, packed, None, out)
            found += [{"kernel": spec.name, "case": str(case), **row} for row in noted]
    return found


def _order(spec: KernelSpec) -> tuple[bool, bool]:
    """Kernels for wgmma, whose copies run beside the products, then those that split K over a cluster of blocks."""
    return spec.target != _TURNS, spec.name.endswith("_gemv")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m nybble.bench.gpu_sanitize_plan", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(argv)
    specs = [spec for spec in all_specs() if spec.target.startswith("sm") and (spec.built or options.dry_run)]
    rows = launches(specs)
    options.file.write_text(json.dumps(rows), encoding="utf-8")
    print(f"plan: {len(rows)} launches of {len(specs)} kernels")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
