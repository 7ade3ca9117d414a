"""Compiles all Triton kernels ahead of time, in every shipped configuration; needs no GPU.

    python -m nybble.bench.gpu_aot DIR [--only GLOB] [--arch 80|90]

Runs the package's host functions on meta tensors with a fake Triton driver, and compiles what they would launch. Writes
a .cubin per kernel to DIR, and index.jsonl: case, kernel, arch, shared_bytes (per block), file. Inspect them with
`cuobjdump -res-usage` and `-sass`, which come with Triton.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from .gpu_aot_cases import cases

ARCHITECTURES = (80, 90)


class _Driver:
    """A fake Triton driver with the methods used during compilation; the device number is the architecture."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self._arch, 32)


@contextmanager
def compiling(arch: int) -> Iterator[list[Any]]:
    """While active, launches only compile for an architecture; yields the list that receives the compiled kernels."""
    found: list[Any] = []

    def launch(self: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: found.append(self.run(*args, grid=grid, warmup=True, **options))

    before, usual = driver._active, KernelInterface.__getitem__
    driver.set_active(_Driver(arch))
    KernelInterface.__getitem__ = launch
    try:
        yield found
    finally:
        KernelInterface.__getitem__, driver._active = usual, before


def compile_all(folder: Path, pattern: str, architectures: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Compiles the cases whose name matches; yields their index lines."""
    for arch in architectures:
        for case, launch in cases(f"sm{arch}"):
            if not fnmatchcase(case, pattern):
                continue
            with compiling(arch) as kernels:
                launch()
            for number, kernel in enumerate(dict.fromkeys(kernels)):
                file = folder / f"{case}.{number}.sm{arch}.cubin"
                file.write_bytes(kernel.asm["cubin"])
                shared = kernel.metadata.shared
                yield {"case": case, "kernel": kernel.name, "arch": arch, "shared_bytes": shared, "file": file.name}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nybble.bench.gpu_aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder; created if it does not exist")
    parser.add_argument("--only", default="*", metavar="GLOB", help="cases to compile")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, or nothing is compiled")
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = list(compile_all(options.folder, options.only, options.arch or ARCHITECTURES))
    (options.folder / "index.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} kernels of {len({row['case'] for row in rows})} cases")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
