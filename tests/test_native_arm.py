"""The C++ kernels of Arm's CPUs against the scalar ones, cross-compiled and run by qemu."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "native" / "arm.sh"
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")

pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}"),
    pytest.mark.skipif(not any(map(shutil.which, EMULATORS)), reason=f"needs {' or '.join(EMULATORS)}"),
    pytest.mark.skipif(not (HERE.parent / "csrc").is_dir() or not SCRIPT.exists(), reason="needs the C++ sources"),
]


@pytest.mark.nightly
def test_kernels_of_arm_give_what_the_scalar_ones_give() -> None:
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, timeout=3600, check=False)  # noqa: S607
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert done.stdout.rstrip().endswith(" passed, 0 failed"), output
