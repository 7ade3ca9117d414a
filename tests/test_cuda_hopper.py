"""The kernels for wgmma without a GPU: run by an emulator on the CPU, and what they are compiled to for sm_90a."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FILES = sorted((HERE.parent / "csrc" / "cuda").glob("*_sm90.cu"))
# The multiply that the main loop of a file's kernels must be made of, and how many instructions it may have for each.
MULTIPLY = {"w4a8_sm90": (r"IGMMA\.64x64x32\.S8\.S8", 200), "w8a8_sm90": (r"IGMMA\.64x(256|128)x32\.S8\.S8", 30)}

needs_sources = pytest.mark.skipif(not FILES, reason="needs the CUDA sources")


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or of Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else Path("none")
    return shutil.which("cuobjdump") or (str(bundled) if bundled.exists() else None)


def loops(sass: str) -> list[list[str]]:
    """The instructions of each loop of a function: from the target of a branch backwards to the branch."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", sass)]
    found = []
    for end, text in code:
        target = re.search(r"\bBRA (?:\w+, )?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < end:
            found.append([inner for at, inner in code if int(target[1], 16) <= at <= end])
    return found


@needs_sources
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_agree_with_integers_and_float64_in_the_emulator(tmp_path: Path) -> None:
    program = tmp_path / "emulate"
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE / 'native'}")
    run("g++", *flags, HERE / "native" / "emulate_hopper.cpp", "-o", program)
    assert re.search(r"^\d{2,} passed, 0 failed$", run(program), re.MULTILINE)


@needs_sources
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", FILES, ids=lambda path: path.stem)
def test_main_loop_keeps_the_tensor_cores_busy(source: Path, tmp_path: Path) -> None:
    cubin = tmp_path / "kernel.cubin"
    target = "arch=compute_90a,code=sm_90a"
    log = run("nvcc", "-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v", "-cubin", "-o", cubin, source)
    kernels = re.findall(r"Compiling entry function '(\w+)'", log)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(kernels) == len(spills) > 0, log
    assert all(amounts == ("0", "0", "0") for amounts in spills), log
    assert "serialized" not in log, log  # ptxas says so where it waits for each wgmma
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton's wheel")
    functions = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", run(tool, "-sass", cubin), re.DOTALL))
    assert set(functions) == set(kernels)
    multiply, most = MULTIPLY[source.stem]
    for name, sass in functions.items():
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name}: local memory"
        assert "UTMALDG.2D" in sass, f"{name}: no copies by the TMA"
        main = min((loop for loop in loops(sass) if any(re.search(multiply, text) for text in loop)), key=len)
        multiplies = sum(bool(re.search(multiply, text)) for text in main)
        assert len(main) <= most * multiplies, f"{name}: {len(main)} instructions for {multiplies} multiplies"
        waits = {text.split("gsb0, ")[1] for text in main if "WARPGROUP.DEPBAR" in text}
        assert waits == {"0x1"}, f"{name}: waits for all but {waits} groups of wgmma"
