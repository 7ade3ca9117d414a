"""What every Triton kernel compiles to, for sm_80 and sm_90, in every configuration that ships. No GPU is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

from nybble.bench.gpu_aot_cases import cases
from nybble.kernels.configs import SHIPPED
from nybble.kernels.table import KERNELS

# Compiling takes two minutes for an architecture.
ARCHITECTURES = [pytest.param(80, marks=pytest.mark.nightly), pytest.param(90, marks=pytest.mark.full)]
CASES = [
    pytest.param(name, *arch.values, marks=arch.marks)
    for arch in ARCHITECTURES
    for name, _ in cases(f"sm{arch.values[0]}")
]
# Bytes of shared memory that a block may have.
SHARED = {80: 163 << 10, 90: 227 << 10}
# Kernel -> the multiply that it is built on, on sm_80 and on sm_90; there mma's where its first operand has few rows.
INT8, FLOAT = ("IMMA", "IGMMA"), ("HMMA", "HGMMA")
BUILT_ON = {
    "w8a8_triton": INT8,
    "w4a8_triton": INT8,
    "bsw8a8_triton": INT8,
    "w8a16_triton": FLOAT,
    "w4a16_triton": FLOAT,
    "blocks_bf16": FLOAT,
}
# Kernels whose first operand is the weights: its rows are the tile's columns.
WEIGHTS_FIRST = ("w4a8_triton", "w8a16_triton", "w4a16_triton")


TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# "/*0a30*/   @!P0 IMMA.16832.S8.S8 R4, ..."
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)
USAGE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")


def of_kernels(names: Collection[str]) -> list[Any]:
    return [case for case in CASES if case.values[0].split("-")[0] in names]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, list[dict]]]:
    """Architecture -> case -> its kernels. In a process of its own: here kernels may be the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    @cache
    def of(arch: int) -> dict[str, list[dict]]:
        folder = tmp_path_factory.mktemp(f"aot{arch}")
        done = subprocess.run(
            [sys.executable, "-m", "nybble.bench.gpu_aot", str(folder), "--arch", str(arch)],
            env={**environment, "TRITON_CACHE_DIR": str(folder / "cache")},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, list[dict]] = {}
        for line in (folder / "index.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(row["case"], []).append({**row, **seen_in(folder / row["file"])})
        return found

    return of


def seen_in(cubin: Path) -> dict:
    """Registers, bytes of local memory, and the instructions of a kernel."""
    usage, sass = (
        subprocess.run([TOOLS / "cuobjdump", option, cubin], check=True, capture_output=True, text=True).stdout
        for option in ("-res-usage", "-sass")
    )
    numbers = {name: int(value) for name, value in USAGE.findall(usage)}
    opcodes = set(OPCODE.findall(sass))
    assert "EXIT" in opcodes, "the disassembly cannot be read"
    return {"registers": numbers["REG"], "local_bytes": numbers["STACK"] + numbers["LOCAL"], "instructions": opcodes}


@pytest.mark.parametrize(("case", "arch"), CASES)
def test_compiles_without_spills_and_fits(compiled: Callable, case: str, arch: int) -> None:
    assert compiled(arch)[case]
    for row in compiled(arch)[case]:
        assert row["local_bytes"] == 0, row
        assert not {"LDL", "STL"} & row["instructions"], row
        assert row["shared_bytes"] <= SHARED[arch], row
        assert row["registers"] <= 255


@pytest.mark.parametrize(("case", "arch"), of_kernels(SHIPPED))
def test_configurations_take_no_more_shared_memory_than_they_are_chosen_by(
    compiled: Callable, case: str, arch: int
) -> None:
    kernel, *_, tile = case.split("-")
    shipped = SHIPPED[kernel]
    (config,) = (one for one in shipped.on(f"sm{arch}") if f"{one.bm}x{one.bn}x{one.bk}x{one.split_k}" == tile)
    taken = max(row["shared_bytes"] for row in compiled(arch)[case])
    assert taken <= shipped.shared_bytes(config)
    assert shipped.shared_bytes(config) <= 4 * taken, "so much more that configurations are left out that would fit"


@pytest.mark.parametrize(("case", "arch"), of_kernels(BUILT_ON))
def test_built_on_the_expected_multiply(compiled: Callable, case: str, arch: int) -> None:
    """mma's on sm_80; on sm_90 the warp groups' wherever the first operand has their 64 rows. Loads run ahead."""
    kernel, *_, tile = case.split("-")
    rows, columns = (int(size) for size in tile.split("x")[:2])
    grouped = arch >= 90 and (columns if kernel in WEIGHTS_FIRST else rows) >= 64
    multiply = compiled(arch)[case][0]
    assert BUILT_ON[kernel][grouped] in multiply["instructions"], multiply
    assert "LDGSTS" in multiply["instructions"], "nothing is loaded ahead"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_float_atomics(compiled: Callable, arch: int) -> None:
    """Sums are added in an order that the shape fixes."""
    for case, rows in compiled(arch).items():
        assert not {"ATOM", "RED", "ATOMG"} & set().union(*(row["instructions"] for row in rows)), case


def test_every_kernel_of_the_table_has_cases() -> None:
    named = {case.values[0].split("-")[0] for case in CASES}
    own = {
        kernel.name
        for kernel in KERNELS
        if kernel.op == "linear" and not kernel.make.where.startswith("matmul_triton:")
    }
    assert own <= named, "those of matmul_triton launch dequantize_triton alone"
    assert set(SHIPPED) <= named
