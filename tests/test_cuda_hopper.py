"""The kernels for wgmma without a GPU: run by an emulator on the CPU, and read from the machine code of the extension."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

from nybble.bench import gpu_sass

HERE = Path(__file__).resolve().parent
W8A8 = re.compile(r"w8a8_sm90_kernelINS0_4W8A8ILi(\d+)E")  # outputs of a tile
W4A8 = re.compile(r"w4a8_sm90_kernelINS0_4W4A8ILi(\d)ELi(\d)ELb(\d)E")  # warpgroups; steps of 32 inputs; one group
# Instructions for each wgmma of w4a8, by its steps of 32 inputs that share a scale; 0: all inputs do.
MOST_W4A8 = {0: 20, 1: 120, 2: 64, 4: 38}


pytestmark = pytest.mark.full


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(not (HERE.parent / "csrc" / "cuda").is_dir(), reason="needs the CUDA sources")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_agree_with_integers_and_float64_in_the_emulator(tmp_path: Path) -> None:
    program = tmp_path / "emulate"
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE / 'native'}")
    run("g++", *flags, HERE / "native" / "emulate_hopper.cpp", "-o", program)
    assert re.search(r"^\d{3,} passed, 0 failed$", run(program), re.MULTILINE)


@lru_cache
def kernels() -> dict[str, str]:
    binary = gpu_sass.extension()
    if binary is None or gpu_sass.cuobjdump() is None:
        pytest.skip("needs the CUDA kernels, and cuobjdump, of CUDA or of triton's wheel")
    found = {name: sass for name, sass in gpu_sass.functions(binary, "sm_90a").items() if "_sm90_kernel" in name}
    if not found:
        pytest.skip("needs CUDA kernels for 90a")
    return found


def main_loop(sass: str, multiply: str) -> tuple[list[str], int, list[str]]:
    """The shortest loop with a multiply; how many it has; how many groups of them each wait leaves under way."""
    loop = next(loop for loop in gpu_sass.loops(sass) if any(multiply in text for text in loop))
    waits = [text.split("gsb0, ")[1] for text in loop if "WARPGROUP.DEPBAR" in text]
    return loop, sum(multiply in text for text in loop), waits


def test_the_tma_copies_and_registers_suffice() -> None:
    assert sum(bool(W8A8.search(name)) for name in kernels()) == 6  # two sizes of a tile, three types of y
    assert sum(bool(W4A8.search(name)) for name in kernels()) == 14  # two sizes, seven kinds of weights
    for name, sass in kernels().items():
        assert "UTMALDG.2D.MULTICAST" in sass, f"{name}: no copies by the TMA for both blocks of a pair"
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name}: local memory"


def test_the_registers_of_a_launch_are_those_that_warpgroups_share() -> None:
    """Each warpgroup that multiplies takes 232 or 224 and the other keeps 40 or 56: with fewer it would wait forever."""
    names, binary = kernels(), gpu_sass.extension()
    usage = run(gpu_sass.cuobjdump(), "-arch", "sm_90a", "-res-usage", binary)
    registers = {name: int(count) for name, count in re.findall(r"Function (\w+):\s+REG:(\d+)", usage)}
    for name in names:
        found = W4A8.search(name)
        warpgroups, many, few = (int(found[1]), 224, 56) if found else (2, 232, 40)
        taken = {f"USETMAXREG.TRY_ALLOC.CTAPOOL UP0, {many:#x}", f"USETMAXREG.DEALLOC.CTAPOOL {few:#x}"}
        assert taken == set(re.findall(r"USETMAXREG[^;]*?0x\w+", names[name])), name
        assert registers[name] * (warpgroups + 1) >= many * warpgroups + few, name


def test_w8a8_never_waits_for_the_last_wgmma() -> None:
    for name, sass in kernels().items():
        if found := W8A8.search(name):
            loop, multiplies, waits = main_loop(sass, f"IGMMA.64x{found[1]}x32.S8.S8")
            assert set(waits) == {"0x1"}, name
            assert len(loop) <= 20 * multiplies, f"{name}: {len(loop)} instructions for {multiplies} multiplies"


def test_w4a8_waits_once_for_two_units() -> None:
    """A half's sums are added while another is multiplied, but for the last of four."""
    for name, sass in kernels().items():
        if found := W4A8.search(name):
            steps = 0 if found[3] == "1" else int(found[2])
            loop, multiplies, waits = main_loop(sass, "IGMMA.64x64x32.S8.S8")
            assert waits == ["0x1", "0x1", "0x1", "0x0"], name
            assert multiplies == 4 * int(found[2]), name
            assert len(loop) <= MOST_W4A8[steps] * multiplies, f"{name}: {len(loop)} instructions"
            assert sum("I2FP.F32.S32" in text for text in loop) == (128 if steps else 0), name
