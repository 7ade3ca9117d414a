"""AMX: the emulation keeps the hardware's rules, the compiled loops are tile loads and multiplies, and the number of rows
chooses between tiles and vectors. The kernels' results are tested like all others', in test_kernels.py."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from nybble import native
from nybble.dispatch import selection
from nybble.dispatch.registry import specs
from nybble.dispatch.selection import ByRows, explain
from nybble.dispatch.spec import Problem
from nybble.weights.scheme import Scheme

HERE = Path(__file__).resolve().parent
EMULATION = HERE / "native" / "emulate_amx.cpp"
BUILT = [row["name"] for row in native.kernel_table() if row["target"] == "amx" and row["built"]]
EMULATED = "emulated" in native.cpu()[1]
TILES = ("w8a8", "w4a8", "w4a8g32", "w8a16", "w4a16g128")

# --- the emulation


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of tests/native/emulate_amx.cpp."""
    if shutil.which("g++") is None or not BUILT or not (HERE.parent / "csrc").is_dir():
        pytest.skip("needs g++, x86-64 and the C++ sources")
    program = tmp_path_factory.mktemp("amx") / "emulate_amx"
    flags = (
        "-std=c++17",
        "-O1",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-ffp-contract=off",
        "-Wno-psabi",
        "-Wno-ignored-attributes",
    )
    subprocess.run(("g++", *flags, str(EMULATION), "-o", str(program)), check=True, timeout=300)  # noqa: S607
    return program


def test_emulated_tiles_multiply_and_keep_the_rules(emulation: Path) -> None:
    done = subprocess.run([emulation], capture_output=True, text=True, timeout=60, check=True)
    first, *breaches = done.stdout.split()
    assert first == "ok"
    assert len(breaches) == 12
    for breach in breaches:
        broken = subprocess.run([emulation, breach], capture_output=True, text=True, timeout=60, check=False)
        assert broken.returncode == -6, breach
        assert broken.stderr.startswith("emulated AMX: "), breach


# --- the machine code

INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(\S+)\s*(.*?)\s*(?:#.*)?$")
MULTIPLIES = ("tdpbssd", "tdpbf16ps", "tdpbusd")
POINTERS = {"add", "sub", "lea", "inc", "dec", "cmp", "mov"}


def innermost_loops(disassembly: str) -> list[list[tuple[str, str]]]:
    """The instructions of each loop without a loop inside that multiplies tiles: (name, operands).

    Not of strips (tile_amx_strips.h), which store and scale the sums of each group.
    """
    code: list[tuple[int, str, str]] = []
    for line in disassembly.splitlines():
        match = INSTRUCTION.match(line)
        if match:
            code.append((int(match[1], 16), match[2], match[3]))
    at = {address: i for i, (address, _, _) in enumerate(code)}
    loops, last = [], -1
    for i, (address, name, operands) in enumerate(code):
        target = re.match(r"([0-9a-f]+)", operands) if name.startswith("j") else None
        begin = at.get(int(target[1], 16)) if target else None
        if begin is None or code[begin][0] > address or begin <= last:
            continue  # no jump backwards, or one around a loop that was seen
        last = begin
        body = [(name, operands) for _, name, operands in code[begin : i + 1]]
        names = {name for name, _ in body}
        if names & set(MULTIPLIES) and "tilestored" not in names:
            loops.append(body)
    return loops


def unwanted(loop: list[tuple[str, str]]) -> list[str]:
    """What a loop of multiplies has besides tile loads, multiplies and arithmetic on pointers in registers."""
    found = []
    # Those of convolutions prefetch the next weights, if there are any.
    ahead = ("prefetcht1", "jae", "jbe") if any(name == "tdpbusd" for name, _ in loop) else ()
    for name, operands in loop[:-1]:  # the last one is the jump
        in_memory = "(" in operands and name != "lea"
        if name not in (*MULTIPLIES, *ahead, "tileloadd", "nop", "nopw", "nopl") and (
            name not in POINTERS or in_memory
        ):
            found.append(f"{name} {operands}")
    return found


LOOP = """
 10:\ttileloadd (%rcx,%r11,1),%tmm6
 16:\ttdpbssd %tmm6,%tmm4,%tmm0
 1c:\tadd    $0x400,%rcx
 24:\tjne    10 <kernel+0x10>
"""


def test_loops_are_found_and_judged() -> None:
    (loop,) = innermost_loops(LOOP + " 30:\tjne    8 <kernel+0x8>\n")
    assert [name for name, _ in loop] == ["tileloadd", "tdpbssd", "add", "jne"]
    assert unwanted(loop) == []
    for spill in (
        "vmovdqa64 %zmm1,0x40(%rsp)",
        "mov    0x8(%rsp),%rcx",
        "add    0x10(%rsp),%rcx",
        "vmovups (%rax),%zmm0",
    ):
        (loop,) = innermost_loops(LOOP.replace("add    $0x400,%rcx", spill))
        assert len(unwanted(loop)) == 1, spill
    assert innermost_loops(LOOP.replace("tdpbssd", "vpdpbusd")) == []


@pytest.mark.full
def test_the_inner_loops_are_tile_loads_and_multiplies() -> None:
    if EMULATED or not BUILT or shutil.which("objdump") is None:
        pytest.skip("needs objdump and an extension for x86-64 that is not emulated")
    command = ["objdump", "-d", "--no-show-raw-insn", native._C.__file__]
    loops = innermost_loops(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)
    assert [line for loop in loops for line in unwanted(loop)] == []
    kinds: Counter[tuple[str, int, int]] = Counter()
    for loop in loops:
        names = Counter(name for name, _ in loop)
        kinds += Counter((name, names[name], names["tileloadd"]) for name in MULTIPLIES if names[name])
    of_kernels = (("w8a8", "w4a8", "bsw8a8"), ("w8a16", "w4a16"), ("conv",))
    for name, kernels in zip(MULTIPLIES, of_kernels, strict=True):
        # Two column tiles by two row tiles: four multiplies for four loads.
        assert kinds[name, 4, 4] >= len(kernels), kinds
        assert kinds[name, 4, 0] == (name != "tdpbusd"), f"the probe: {kinds}"
        assert set(kinds) <= {(of, *counts) for of in MULTIPLIES for counts in ((4, 4), (2, 3), (1, 2), (4, 0))}


# --- the choice


@pytest.mark.usefixtures("x86_kernels")
@pytest.mark.parametrize("scheme", TILES)
def test_the_number_of_rows_chooses_between_tiles_and_vectors(scheme: str, machine) -> None:
    machine("amx")
    parsed = Scheme.parse(scheme)
    spec = next(spec for spec in specs() if spec.name == f"{parsed.family}_amx")
    least, most = spec.m_range
    assert least > 1
    assert most is None
    problem = {"scheme": parsed, "n": 64, "k": 256, "dtype": torch.bfloat16}
    few, many = explain(Problem(**problem, m=least - 1)), explain(Problem(**problem, m=least))
    below = {"a8": "avx512vnni", "16": "avx512bf16"}[parsed.family[-2:]]
    assert (few.kernel, many.kernel) == (f"{parsed.family}_{below}", spec.name)
    assert few.rejected[spec.name] == f"is for {least} rows and more, not {least - 1}"
    layouts = {s.layout for s in specs() if s.name in (few.kernel, many.kernel)}
    assert len(layouts) == 1, "one packed weight serves both"


@pytest.mark.usefixtures("x86_kernels")
def test_float_activations_other_than_bfloat16_stay_with_vectors(machine) -> None:
    machine("amx")
    for dtype in (torch.float32, torch.float16):
        problem = Problem(Scheme.parse("w4a16g128"), m=64, n=64, k=256, dtype=dtype)
        assert explain(problem).kernel == "w4a16_avx512bw"


@pytest.mark.parametrize("scheme", TILES)
def test_machines_without_tiles_do_not_pay_for_the_choice(scheme: str, machine) -> None:
    """Their plans are the kernel's own: no lookup by the number of rows."""
    layout = "n16k4" if scheme.startswith("w8") else "n16k8"
    plans = {}
    for target in ("avx512bf16", "amx"):
        machine(target)
        plans[target] = selection.plan_for(scheme, layout, 64, 256, torch.bfloat16, "cpu")
    assert not isinstance(plans["avx512bf16"], ByRows)
    assert isinstance(plans["amx"], ByRows)
