"""Compiles every Triton kernel that ships, in every configuration, for GPUs that need not be here, and looks at the result.

    python -m nybble.bench.gpu_aot [--only GLOB] [--arch 80|90] [--out FILE]

The package's own host functions run on tensors without memory, under a driver that stands in for a GPU's: what is
compiled is what they would launch. One JSON line a kernel: registers, local and shared memory, instructions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from .gpu_aot_cases import cases

ARCHITECTURES = (80, 90)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What a kernel may claim to be built on, and what would show that registers did not suffice.
INSTRUCTIONS = ("IGMMA", "IMMA", "HGMMA", "HMMA", "LDL", "STL", "LDGSTS", "FFMA", "IDP4A", "ATOM", "RED")


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled: bytes of local memory a thread (spills) and of shared memory a block, counts of instructions."""

    case: str
    kernel: str
    arch: int
    registers: int
    local_bytes: int
    shared_bytes: int
    instructions: dict[str, int]


class _Driver:
    """What Triton asks of a GPU's driver while it compiles; a device for each architecture."""

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
    """Launches compile for an architecture instead, into the list that is yielded."""
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


def inspect(case: str, arch: int, kernel: Any) -> Compiled:
    """Reads a compiled kernel with the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (_run("cuobjdump", option, file.name) for option in ("-res-usage", "-sass"))
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    # "/*0a30*/   @!P0 IMMA.16832.S8.S8 R4, ..."
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.MULTILINE)
    return Compiled(
        case=case,
        kernel=kernel.name,
        arch=arch,
        registers=numbers["REG"],
        local_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        instructions={name: opcodes.count(name) for name in INSTRUCTIONS if name in opcodes},
    )


def _run(tool: str, *args: str) -> str:
    return subprocess.run([_TOOLS / tool, *args], check=True, capture_output=True, text=True).stdout  # noqa: S603


def compile_all(pattern: str = "*", architectures: Sequence[int] = ARCHITECTURES) -> Iterator[Compiled]:
    """Every kernel of the cases whose name matches, for each architecture."""
    for arch in architectures:
        for name, launch in cases(f"sm{arch}"):
            if fnmatchcase(name, pattern):
                with compiling(arch) as kernels:
                    launch()
                for kernel in dict.fromkeys(kernels):
                    yield inspect(name, arch, kernel)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nybble.bench.gpu_aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", metavar="GLOB", help="cases to compile")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: each")
    parser.add_argument("--out", type=Path, help="file for the lines; default: standard output")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    lines = [json.dumps(asdict(compiled)) for compiled in compile_all(options.only, options.arch or ARCHITECTURES)]
    if options.out:
        options.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    else:
        print(*lines, sep="\n")
    return 0 if lines else 1


if __name__ == "__main__":
    sys.exit(main())
