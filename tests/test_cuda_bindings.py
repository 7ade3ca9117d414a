"""What csrc/cuda/bindings.cpp refuses before a kernel runs, compiled with a CUDA runtime that only pretends."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

pybind11 = pytest.importorskip("pybind11", reason="builds an extension")

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc" / "cuda"
FAKE = HERE / "native" / "fake_cuda"

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not SOURCES.is_dir(), reason="needs g++ and the CUDA sources"
)

# Addresses that nobody reads, and what lies there; bytes as a product of 3 rows of 200 inputs and 70 outputs needs.
N, K, M = 70, 200, 3
PACKED = 128 * 256 // 2 + 4 * 128 * 2 + 128 * 4
F32, BF16, F16 = 0, 1, 2
CALL = {
    "x": 1 << 40,
    "x_bytes": M * K * 2,
    "x_dtype": BF16,
    "m": M,
    "ldx": K,
    "packed": 1 << 41,
    "packed_bytes": PACKED,
    "bias": 0,
    "bias_bytes": 0,
    "bias_dtype": 0,
    "y": 1 << 42,
    "y_bytes": M * N * 2,
    "y_dtype": BF16,
    "scratch": 0,
    "scratch_bytes": 0,
    "stream": 0,
}
TABLE = SOURCES / "kernels.def"
KERNELS = re.findall(r"^NYBBLE_CUDA\((\w+),", TABLE.read_text(), re.MULTILINE) if TABLE.is_file() else []


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("bindings")
    shutil.copy(TABLE, folder / "cuda_built.def")
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = (FAKE, folder, pybind11.get_include(), sysconfig.get_path("include"))
    command = ["g++", "-std=c++17", "-O0", "-fPIC", "-shared", "-Wall", "-Wextra", '-DNYBBLE_VERSION="test"']
    command += [*(f"-I{path}" for path in includes), SOURCES / "bindings.cpp", FAKE / "kernels.cpp", "-o", library]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(extension, kernel: str = "w4a16_sm80_gemv"):
    offsets = [0, 128 * 256 // 2, -1, PACKED - 128 * 4, -1, PACKED]
    shape = {"n": N, "k": K, "n_padded": 128, "k_padded": 256, "group_shift": 6}
    return extension.Plan(kernel=kernel, device=0, offsets=offsets, **shape)


def run(made, **changed: int) -> None:
    made.run(*{**CALL, **changed}.values())


def test_a_product_that_fits_is_launched(extension) -> None:
    run(plan(extension))
    run(plan(extension), bias=1 << 43, bias_bytes=N * 4, bias_dtype=F32)
    run(plan(extension), m=0, x_bytes=0, y_bytes=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"packed": (1 << 41) + 8}, r"packed: begins at address 2199023255560, must be a multiple of 16"),
        ({"packed_bytes": PACKED - 1}, rf"packed: has {PACKED - 1} bytes, needs {PACKED}"),
        ({"x": (1 << 40) + 2}, r"x: dtype=1 at address 1099511627778 with stride 200, must be bfloat16"),
        ({"ldx": 201, "x_bytes": 1 << 20}, r"with stride 201, .* start at a multiple of 16 bytes"),
        ({"x_dtype": F32, "x_bytes": 1 << 20}, r"x: dtype=0 .* must be bfloat16 or float16"),
        ({"x_bytes": M * K * 2 - 1}, r"x: has 1199 bytes, needs 1200"),
        ({"m": -1}, r"x: has -1 rows"),
        ({"ldx": 192}, r"x: has 3 rows with stride 192, must have .* at least 200"),
        ({"y_bytes": M * N * 2 - 1}, r"y: has 419 bytes, needs 420"),
        ({"bias": 1 << 43, "bias_bytes": N * 2 - 1, "bias_dtype": F16}, r"bias: has 139 bytes, needs 140"),
        ({"y_dtype": 7}, r"dtype=7"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_a_kernel_could_not_read_is_refused(extension, changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(plan(extension), **changed)


def test_codes_of_activations_want_scratch_that_vectors_can_read(extension) -> None:
    made = plan(extension, "w4a8_sm80")
    size = made.scratch(M)
    assert size >= M * (256 + 8)
    odd = {"x": (1 << 40) + 4, "x_dtype": F32, "x_bytes": M * K * 4}  # any float, at any address
    run(made, **odd, scratch=1 << 44, scratch_bytes=size)
    with pytest.raises(ValueError, match=r"scratch: begins at address \d+, must be a multiple of 16"):
        run(made, **odd, scratch=(1 << 44) + 8, scratch_bytes=size)
    with pytest.raises(ValueError, match=rf"scratch: has {size - 1} bytes, needs {size}"):
        run(made, **odd, scratch=1 << 44, scratch_bytes=size - 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_bound(extension, kernel: str) -> None:
    made = plan(extension, kernel)
    codes = kernel.split("_")[0].endswith("a8")
    size = made.scratch(M)
    assert (size > 0) == codes, "splits add their sums as clusters"
    run(made, scratch=1 << 44 if size else 0, scratch_bytes=size)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name.endswith("_sm90")])
def test_kernels_that_keep_k_whole_want_no_room_for_sums(extension, kernel: str) -> None:
    shape = {"n": 128, "k": 8192, "n_padded": 128, "k_padded": 8192, "group_shift": 31}
    whole = extension.Plan(kernel=kernel, device=0, offsets=[0, 0, -1, 0, -1, 1 << 20], **shape)
    assert 300 * (8192 + 8) <= whole.scratch(300) < 300 * (8192 + 8) + 16


def test_what_the_device_runs_at_once_is_told(extension) -> None:
    rows = extension.instances(0)
    assert list(dict.fromkeys(row["kernel"] for row in rows)) == KERNELS
    assert rows[0]["clusters"] == dict(zip(range(2, 9), (190, 120, 90, 70, 60, 50, 40), strict=True))


def test_a_failure_is_not_the_next_kernels(extension, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"n": N, "k": K, "n_padded": 128, "k_padded": 256, "group_shift": 31, "offsets": [0, 1, -1, 2, -1, 3]}
    other = 1  # a device on which no test has loaded a kernel before
    monkeypatch.setenv("FAKE_REFUSES", "w4a8_sm80")
    monkeypatch.setenv("FAKE_ERROR", "2")
    with pytest.raises(RuntimeError, match="w4a8_sm80: an error"):
        extension.Plan(kernel="w4a8_sm80", device=other, **shape)
    made = extension.Plan(kernel="w8a8_sm80", device=other, **shape)
    run(made, scratch=1 << 43, scratch_bytes=made.scratch(M))  # its launch asks the runtime for the last error


@pytest.mark.parametrize("error", ["98", "209"])
def test_kernels_without_code_for_the_device_are_left_out(extension, monkeypatch, error: str) -> None:
    everything = {row["kernel"] for row in extension.instances(0)}
    monkeypatch.setenv("FAKE_REFUSES", "w8a8_sm90")
    monkeypatch.setenv("FAKE_ERROR", error)
    assert {row["kernel"] for row in extension.instances(0)} == everything - {"w8a8_sm90"}
    monkeypatch.setenv("FAKE_ERROR", "2")
    with pytest.raises(RuntimeError, match="w8a8_sm90: an error"):
        extension.instances(0)
