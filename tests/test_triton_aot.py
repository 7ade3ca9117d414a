"""What every Triton kernel compiles to, for sm_80 and sm_90, in every configuration that ships. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

from nybble.bench.gpu_aot_cases import cases
from nybble.kernels.configs import SHIPPED
from nybble.kernels.table import KERNELS

CASES = [(name, arch) for arch in (80, 90) for name, _ in cases(f"sm{arch}")]
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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[dict]]:
    """(case, architecture) -> its kernels. In a process of its own: here kernels may be the interpreter's."""
    folder = tmp_path_factory.mktemp("aot")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    found: dict[tuple[str, int], list[dict]] = {}
    command = [sys.executable, "-m", "nybble.bench.gpu_aot", "--out"]
    outs = {arch: folder / f"{arch}.jsonl" for arch in SHARED}
    running = [
        subprocess.Popen([*command, str(out), "--arch", str(arch)], env=environment, stderr=subprocess.PIPE, text=True)
        for arch, out in outs.items()
    ]
    for process in running:
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors
    for out in outs.values():
        for line in Path(out).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.setdefault((row["case"], row["arch"]), []).append(row)
    return found


@pytest.mark.parametrize(("case", "arch"), CASES)
def test_compiles_without_spills_and_fits(compiled: dict, case: str, arch: int) -> None:
    assert compiled[case, arch]
    for row in compiled[case, arch]:
        assert row["local_bytes"] == 0, row
        assert not {"LDL", "STL"} & set(row["instructions"]), row
        assert row["shared_bytes"] <= SHARED[arch], row
        assert row["registers"] <= 255


@pytest.mark.parametrize(("case", "arch"), [(case, arch) for case, arch in CASES if case.split("-")[0] in BUILT_ON])
def test_built_on_the_expected_multiply(compiled: dict, case: str, arch: int) -> None:
    """mma's on sm_80; on sm_90 the warp groups' wherever the first operand has their 64 rows. Loads run ahead."""
    kernel, *_, tile = case.split("-")
    rows, columns = (int(size) for size in tile.split("x")[:2])
    grouped = arch >= 90 and (columns if kernel in WEIGHTS_FIRST else rows) >= 64
    multiply = compiled[case, arch][0]
    assert BUILT_ON[kernel][grouped] in multiply["instructions"], multiply
    assert "LDGSTS" in multiply["instructions"], "nothing is loaded ahead"


@pytest.mark.parametrize("arch", SHARED)
def test_no_float_atomics(compiled: dict, arch: int) -> None:
    """Sums are added in an order that the shape fixes."""
    for (case, where), rows in compiled.items():
        if where == arch:
            assert not {"ATOM", "RED", "ATOMG"} & set().union(*(row["instructions"] for row in rows)), case


def test_every_kernel_of_the_table_has_cases() -> None:
    named = {case.split("-")[0] for case, _ in CASES}
    assert {kernel.name for kernel in KERNELS if kernel.op == "linear"} <= named
    assert set(SHIPPED) <= named
