"""What CMake says of the CUDA kernels: built, not built and why, or refused. Configures alone: nothing is compiled."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pybind11 = pytest.importorskip("pybind11", reason="needs pybind11, of the build")
pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake"),
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").is_file(), reason="needs the sources"),
]
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
