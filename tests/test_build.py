"""What CMake builds of the CUDA kernels, and why not or what it refuses; and for Arm. It configures: nothing is compiled."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from nybble.dispatch import targets

ROOT = Path(__file__).resolve().parents[1]
pybind11 = pytest.importorskip("pybind11", reason="needs pybind11, of the build")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake"),
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").is_file(), reason="needs the sources"),
]
ARM = [target.name for target in targets.table() if "neon" in target.needs]
NO_NVCC = "-DCMAKE_CUDA_COMPILER=NOTFOUND"


def configure(folder: Path, *options: str) -> tuple[int, str]:
    command = ["cmake", "-S", ROOT, "-B", folder, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", "-DSKBUILD_PROJECT_VERSION=0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    text = " ".join((done.stdout + done.stderr).split())
    if "Could NOT find Python" in text:
        pytest.skip("needs Python's headers")
    return done.returncode, text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-DNYBBLE_CUDA=OFF"], "CUDA kernels: not built (NYBBLE_CUDA=OFF)"),
        ([NO_NVCC], "CUDA kernels: not built (no nvcc found on PATH or in CUDACXX)"),
    ],
    ids=["off", "auto"],
)
def test_without_cuda_it_configures_and_says_why(options: list[str], said: str, tmp_path: Path) -> None:
    code, text = configure(tmp_path, *options)
    assert code == 0, text
    assert said in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-DNYBBLE_CUDA=ON", NO_NVCC], "NYBBLE_CUDA=ON: no nvcc found on PATH or in CUDACXX"),
        (["-DNYBBLE_CUDA=MAYBE"], "NYBBLE_CUDA=MAYBE: must be AUTO, ON or OFF"),
    ],
    ids=["on", "else"],
)
def test_what_cannot_be_built_is_refused(options: list[str], said: str, tmp_path: Path) -> None:
    code, text = configure(tmp_path, *options)
    assert code != 0
    assert said in text


def test_objects_of_kernels_are_in_no_folder_that_a_new_environment_of_pip_empties(tmp_path: Path) -> None:
    code, text = configure(tmp_path, "-DNYBBLE_CUDA=OFF", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    assert code == 0, text
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    emptied = set()
    for entry in commands:
        written = Path(entry["directory"], entry["command"].split(" -o ")[1].split()[0])
        if written.is_relative_to(tmp_path / "CMakeFiles"):
            emptied.add(Path(entry["file"]).stem)
    names = {Path(entry["file"]).stem for entry in commands}
    assert {"w8a8_scalar", "table"} <= names - emptied
    assert emptied
    assert {name for name in emptied if not name.startswith("bindings")} <= {"aot", "no_python"}


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs aarch64-linux-gnu-g++")
def test_a_wheel_for_arm_has_the_kernels_of_arm(tmp_path: Path) -> None:
    headers = [f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}", "-DSKBUILD_SOABI=cpython-3-aarch64-linux-gnu"]
    toolchain = [f"-DCMAKE_TOOLCHAIN_FILE={ROOT / '.ci' / 'linux-aarch64.cmake'}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    code, text = configure(tmp_path, "-DNYBBLE_CUDA=OFF", *headers, *toolchain)
    assert code == 0, text
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    compiled = {Path(entry["file"]).stem: entry["command"] for entry in commands}
    table = (ROOT / "csrc" / "kernels.def").read_text()
    found = re.findall(r"^NYBBLE_[A-Z0-9]+\((\w+), (?:\w*a\d+, )?(\w+)[,)]", table, re.MULTILINE)
    expected = {name for name, target in found if target == "scalar" or target in ARM}
    assert {Path(name).stem for name in compiled if (ROOT / "csrc" / "cpu" / f"{name}.cpp").is_file()} == expected
    assert all("aarch64-linux-gnu-g++" in command and "-mavx" not in command for command in compiled.values())
    assert "+i8mm" in compiled["w8a8_i8mm"]
    cache = (tmp_path / "CMakeCache.txt").read_text()  # the name that Python looks for there
    assert "PYTHON_MODULE_EXTENSION:INTERNAL=.cpython-3-aarch64-linux-gnu.so\n" in cache


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
TABLE = ROOT / "csrc" / "cuda" / "kernels.def"


def cuda_kernels(*targets: str) -> set[str]:
    """The kernels of the table, of the targets that are named."""
    found = re.findall(r"^NYBBLE_CUDA\((\w+), \w+, (\w+),", TABLE.read_text(), re.MULTILINE)
    return {name for name, target in found if target in targets}


def built(folder: Path) -> set[str]:
    return set(re.findall(r"^NYBBLE_CUDA\((\w+),", (folder / "cuda_built.def").read_text(), re.MULTILINE))


def compiled_for(folder: Path) -> dict[str, list[str]]:
    """The -gencode of each CUDA kernel, from the commands that would compile it."""
    commands = json.loads((folder / "compile_commands.json").read_text())
    return {
        Path(entry["file"]).stem: re.findall(r"-gencode=arch=(\S+?),code=(\S+)", entry["command"])
        for entry in commands
        if entry["file"].endswith(".cu")
    }


@needs_nvcc
def test_kernels_are_compiled_for_every_generation(tmp_path: Path) -> None:
    code, text = configure(tmp_path, "-DNYBBLE_CUDA=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    assert code == 0, text
    assert built(tmp_path) == cuda_kernels("sm80", "sm90") != set()
    everywhere = [*((f"compute_{a}", f"sm_{a}") for a in ("80", "90a", "100", "120")), ("compute_80", "compute_80")]
    found = compiled_for(tmp_path)
    assert all(sorted(found[name]) == sorted(everywhere) for name in cuda_kernels("sm80"))
    assert all(found[name] == [("compute_90a", "sm_90a")] for name in cuda_kernels("sm90"))


@needs_nvcc
@pytest.mark.parametrize(
    ("architectures", "code_of_sm80", "has_sm90"),
    [
        ("90a", [("compute_90a", "sm_90a")], True),
        ("80;86", [("compute_80", "sm_80"), ("compute_80", "compute_80"), ("compute_86", "sm_86")], False),
    ],
)
def test_kernels_are_compiled_for_the_generations_that_are_asked_for(
    architectures: str, code_of_sm80: list[tuple[str, str]], has_sm90: bool, tmp_path: Path
) -> None:
    options = ["-DNYBBLE_CUDA=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", f"-DNYBBLE_CUDA_ARCHITECTURES={architectures}"]
    code, text = configure(tmp_path, *options)
    assert code == 0, text
    found, sm90 = compiled_for(tmp_path), cuda_kernels("sm90")
    assert built(tmp_path) == set(found) == cuda_kernels("sm80") | (sm90 if has_sm90 else set())
    assert all(found[name] == code_of_sm80 for name in cuda_kernels("sm80"))
    for name in set() if has_sm90 else sm90:
        assert f"{name} not built (no code for {architectures})" in text


@pytest.mark.parametrize(
    ("architectures", "said"),
    [
        ("", "NYBBLE_CUDA_ARCHITECTURES is empty: must be a list with elements from 80, 86"),
        ("90a;75", "NYBBLE_CUDA_ARCHITECTURES=90a;75: 75 must be one of 80, 86"),
        ("sm_80", "NYBBLE_CUDA_ARCHITECTURES=sm_80: sm_80 must be one of 80, 86"),
        ("80, 86", "NYBBLE_CUDA_ARCHITECTURES=80, 86: 80, 86 must be one of 80, 86, 87"),
    ],
    ids=["none", "too old", "not a number", "commas"],
)
def test_generations_that_cannot_be_built_for_are_refused(architectures: str, said: str, tmp_path: Path) -> None:
    code, text = configure(tmp_path, f"-DNYBBLE_CUDA_ARCHITECTURES={architectures}")
    assert code != 0
    assert said in text


def test_without_cuda_no_kernel_is_said_to_be_built(tmp_path: Path) -> None:
    code, text = configure(tmp_path, "-DNYBBLE_CUDA=OFF")
    assert code == 0, text
    assert built(tmp_path) == set()
