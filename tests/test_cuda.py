"""The CUDA kernels without a GPU: run by an emulator on the CPU, and read from the machine code of the extension."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

from nybble import native
from nybble.bench import gpu_sass

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
# What the inner loop of a kernel is made of, by the types of its weights and activations.
MULTIPLY = {
    ("Frag4", "Bf16"): "HMMA.16816.F32.BF16",
    ("Frag4", "F16"): "HMMA.16816.F32 ",
    ("Frag4", "S8"): "IMMA.16832.S8.S8",
    ("Rows8", "Bf16"): "HMMA.16816.F32.BF16",
    ("Rows8", "F16"): "HMMA.16816.F32 ",
    ("Rows8", "S8"): "IMMA.16832.S8.S8",
    ("Quads4", "Bf16"): "HMMA.SP.16832.F32.BF16",
    ("Quads4", "F16"): "HMMA.SP.16832.F32 ",
    ("Quads8", "Bf16"): "HMMA.SP.16832.F32.BF16",
    ("Quads8", "F16"): "HMMA.SP.16832.F32 ",
    ("Quads16", "Bf16"): "HMMA.SP.16832.F32.BF16",
}
# Instructions that a tile of 64 x 64 weights may take on sm_90a, by kernel, types and eights of tokens: of weights
# without zero points, in groups of 64 (8-bit activations: 128) and more. The first GPU runs are planned by them.
MOST = {
    ("stream", "Frag4", "Bf16", 1): 350,
    ("stream", "Frag4", "F16", 1): 350,
    ("stream", "Rows8", "Bf16", 1): 400,
    ("stream", "Rows8", "F16", 1): 310,
    ("tiles", "Frag4", "Bf16", 2): 360,
    ("tiles", "Frag4", "Bf16", 4): 450,
    ("tiles", "Frag4", "Bf16", 8): 460,
    ("tiles", "Rows8", "Bf16", 8): 480,
    ("tiles", "Frag4", "S8", 1): 140,
    ("tiles", "Frag4", "S8", 2): 160,
    ("tiles", "Frag4", "S8", 4): 240,
    ("tiles", "Frag4", "S8", 8): 240,
    ("tiles", "Rows8", "S8", 1): 140,
    ("tiles", "Rows8", "S8", 8): 240,
}
# "tiles_kernelINS0_5Frag4ILb1ELi1ELi2EEENS0_2S8ELi4EE...": with zero points, parts of a step, tiles of a step.
KERNEL = re.compile(
    r"(stream|tiles)_kernelINS0_\d+([A-Z][a-z]+\d+)(?:ILb(\d)ELi(\d)ELi(\d)EE|ILi(\d)EE)?E?NS0_\d+(Bf16|F16|S8)E(?:Li(\d)E)?"
)

needs_extension = pytest.mark.skipif(gpu_sass.extension() is None, reason="needs the CUDA kernels: nvcc at build time")
needs_tool = pytest.mark.skipif(gpu_sass.cuobjdump() is None, reason="needs cuobjdump, of CUDA or of triton's wheel")


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.skipif(not SOURCES.is_dir(), reason="needs the CUDA sources")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_agree_with_float64_in_the_emulator(tmp_path: Path) -> None:
    program = tmp_path / "emulate"
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE / 'native'}")
    run("g++", *flags, HERE / "native" / "emulate_cuda.cpp", "-o", program)
    assert re.search(r"^\d{3,} passed, 0 failed$", run(program), re.MULTILINE)


@lru_cache
def compiled(arch: str) -> dict[str, str]:
    """Every kernel of the extension for an architecture."""
    binary = gpu_sass.extension()
    assert binary is not None
    return gpu_sass.functions(binary, arch)


def main_kernels(arch: str) -> dict[tuple, str]:
    """Kind, types, eights of tokens, zero points, parts and tiles of each multiplying kernel -> its code."""
    found = {}
    for name, sass in compiled(arch).items():
        if match := KERNEL.search(name):
            kind, weights, symmetric, parts, tiles, quads_parts, activations, eights = match.groups()
            form = (symmetric == "0", int(parts or quads_parts or 1), int(tiles or 1))
            found[(kind, weights, activations, int(eights or 1), *form)] = sass
    return found


@needs_extension
@needs_tool
@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_is_compiled_without_spills_to_the_expected_instructions(arch: str) -> None:
    kernels = main_kernels(arch)
    assert len(kernels) > 80
    assert {key[1:3] for key in kernels} == MULTIPLY.keys()
    for name, sass in compiled(arch).items():
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name}: local memory"
    for key, sass in kernels.items():
        assert MULTIPLY[key[1:3]] in sass, key
        assert re.search(r"LDGSTS\.E(\.\w+)*\.128", sass), f"{key}: no 16-byte copies"
        assert "LDS.128" in sass, f"{key}: no 16-byte reads"


@needs_extension
@needs_tool
@pytest.mark.full
@pytest.mark.parametrize("limit", MOST.items(), ids=lambda item: "-".join(map(str, item[0])))
def test_a_tile_takes_few_instructions(limit: tuple[tuple, int]) -> None:
    (kind, weights, activations, eights), most = limit
    tiles = 2 if (weights, activations) == ("Frag4", "S8") else 1
    sass = main_kernels("sm_90a")[kind, weights, activations, eights, False, 1, tiles]
    multiply = MULTIPLY[weights, activations]
    main = next(loop for loop in gpu_sass.loops(sass) if any(multiply in text for text in loop))
    assert len(main) <= most * tiles
    assert len(main) > most * tiles // 2, "so few that this limit holds nothing"


@needs_extension
@needs_tool
def test_every_kernel_of_the_table_is_in_the_extension() -> None:
    """Each line of kernels.def that is built has code of its own for each architecture of its target."""
    table = native.cuda_kernel_table()
    assert all(row["built"] for row in table), [row["name"] for row in table if not row["built"]]
    of_sm90 = [name for name in compiled("sm_90a") if "_sm90_kernel" in name]
    assert len({name.split("_kernel")[0] for name in of_sm90}) == sum(row["target"] == "sm90" for row in table)
