"""The C++ sources under g++'s address and undefined-behaviour sanitizers, without Python."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "native" / "sanitize.sh"


pytestmark = [
    pytest.mark.skipif(shutil.which("bash") is None or shutil.which("g++") is None, reason="needs bash and g++"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="builds kernels for x86-64"),
    pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo"),
    pytest.mark.skipif(not (HERE.parent / "csrc").is_dir() or not SCRIPT.exists(), reason="needs the C++ sources"),
]


@pytest.mark.parametrize(
    ("options", "seconds"),
    [pytest.param([], 1200, marks=pytest.mark.full), pytest.param(["all"], 7200, marks=pytest.mark.nightly)],
    ids=["as this CPU runs them", "AVX-512 emulated too"],
)
def test_kernels_are_clean_under_sanitizers(options: list[str], seconds: int) -> None:
    done = subprocess.run(["bash", SCRIPT, *options], capture_output=True, text=True, timeout=seconds, check=False)  # noqa: S607
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert done.stdout.rstrip().endswith(" passed, 0 failed"), output
