"""The CUDA kernels without a GPU: run by an emulator on the CPU, and compiled for every architecture, where nvcc is."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc" / "cuda"
FILES = sorted(path for path in SOURCES.glob("*.cu") if not path.stem.endswith("_sm90"))  # see test_cuda_hopper.py
ARCHITECTURES = ("80", "90a", "100", "120")
# What the inner loop of a kernel must be made of, by the start of its file's name.
MULTIPLY = {
    "sp24w16a16": "HMMA.SP.16832.F32.BF16",
    "sp24w8a16": "HMMA.SP.16832.F32",
    "sp24w4a16": "HMMA.SP.16832.F32",
    "w4a16": "HMMA.16816.F32",
    "w8a16": "HMMA.16816.F32",
    "w4a8": "IMMA.16832.S8.S8",
}

needs_sources = pytest.mark.skipif(not FILES, reason="needs the CUDA sources")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or of Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(bundled) if bundled and bundled.exists() else None


@needs_sources
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_agree_with_float64_in_the_emulator(tmp_path: Path) -> None:
    program = tmp_path / "emulate"
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE / 'native'}")
    run("g++", *flags, HERE / "native" / "emulate_cuda.cpp", "-o", program)
    assert re.search(r"^\d{3,} passed, 0 failed$", run(program), re.MULTILINE)


@needs_sources
@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", FILES, ids=lambda path: path.stem)
def test_compiles_without_spills_to_the_expected_instructions(source: Path, architecture: str, tmp_path: Path) -> None:
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    cubin = tmp_path / "kernel.cubin"
    log = run("nvcc", "-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v", "-cubin", "-o", cubin, source)
    kernels = re.findall(r"Compiling entry function '(\w+)'", log)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(kernels) == len(spills) > 0, log
    assert all(amounts == ("0", "0", "0") for amounts in spills), log
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton's wheel")
    functions = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", run(tool, "-sass", cubin), re.DOTALL))
    inner = {name: sass for name, sass in functions.items() if "stream_kernel" in name or "tiles_kernel" in name}
    assert inner, list(functions)
    for name, sass in inner.items():
        assert MULTIPLY[source.stem.split("_")[0]] in sass, name
        assert re.search(r"LDGSTS\.E(\.\w+)*\.128", sass), f"{name}: no 16-byte copies"
        assert "LDS.128" in sass, f"{name}: no 16-byte reads"
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name}: local memory"
