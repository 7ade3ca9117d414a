"""What is carried to a machine without a network: collected within a size, without what is of no use there, and loaded."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nybble
from nybble.bench import gpu_wheels, gpu_wheels_check
from nybble.bench.gpu_wheels import WHEELS, Wheel

PACKAGE = Path(nybble.__file__).parent


def wheel(folder: Path, name: str, metadata: str = "", files: dict[str, bytes] | None = None) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    whole = {**(files or {}), f"{name}-1.0.dist-info/METADATA": f"Name: {name}\n{metadata}".encode()}
    whole[f"{name}-1.0.dist-info/RECORD"] = "".join(f"{file},sha256=x,1\n" for file in whole).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in whole.items():
            archive.writestr(file, data)
    return path


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch):
    """Stands for pip: `size` bytes of every wheel, or an error of what is in `fails`."""
    asked: list[str] = []

    def run(command, **_):
        requirement, folder = command[-1], Path(command[command.index("-w") + 1])
        asked.append(requirement)
        if requirement in fails:
            return subprocess.CompletedProcess(command, 1, "", "some\nERROR: nothing fits\nmore")
        wheel(folder, requirement.split("=")[0].replace("-", "_"), files={"big.so": b"\0" * size})
        return subprocess.CompletedProcess(command, 0, "", "")

    fails: set[str] = set()
    size = 3 << 20
    monkeypatch.setattr(subprocess, "run", run)
    return asked, fails


def test_wheels_are_collected_while_they_fit(pip, tmp_path: Path) -> None:
    one, other = Wheel("one-thing", "peer"), Wheel("other==1.*", "peer")
    assert gpu_wheels.collect(one, tmp_path, most=4).startswith("added    one_thing-1.0-py3-none-any.whl  3.0 MiB")
    said = gpu_wheels.collect(other, tmp_path, most=4)
    assert said == "left out other==1.*: 3.0 MiB exceed the limit of 4 in all"
    assert [path.name for path in tmp_path.iterdir()] == ["one_thing-1.0-py3-none-any.whl"], "nothing else stays"


def test_what_pip_cannot_give_is_said(pip, tmp_path: Path) -> None:
    pip[1].add("one")
    assert gpu_wheels.collect(Wheel("one", "peer"), tmp_path, 60) == "left out one: pip: ERROR: nothing fits"
    assert not list(tmp_path.iterdir())


def test_all_are_asked_for_once(pip, tmp_path: Path) -> None:
    assert gpu_wheels.main([str(tmp_path)]) == 0
    assert pip[0] == [wheel.requirement for wheel in WHEELS]
    assert gpu_wheels.main([str(tmp_path)]) == 0
    assert len(pip[0]) == len(WHEELS), "what is there is not fetched again"


def test_files_of_no_use_are_taken_out_and_off_the_list(tmp_path: Path) -> None:
    path = wheel(tmp_path, "one", files={"one/lib_cuda12.so": b"12", "one/lib_cuda13.so": b"13"})
    gpu_wheels.trim(path, Wheel("one", "peer", drop=r"cuda12"))
    with zipfile.ZipFile(path) as archive:
        assert archive.read("one/lib_cuda13.so") == b"13"
        assert not [name for name in archive.namelist() if "cuda12" in name]
        record = archive.read("one-1.0.dist-info/RECORD").decode()
    assert "cuda13" in record
    assert "cuda12" not in record
    assert list(tmp_path.iterdir()) == [path]


def fatbin(*entries: tuple[int, int, bytes]) -> bytes:
    """A container of (kind, capability, code), as nvcc writes it."""
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(code), 0, 0, 0, 0, capability) + bytes(32) + code
        for kind, capability, code in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_the_code_for_other_gpus_is_zeroed() -> None:
    entries = [(2, 80, b"a" * 40), (2, 90, b"b" * 48), (1, 90, b"ptx" * 8), (2, 120, b"c" * 24)]
    others = [(kind, at, code if (kind, at) == (2, 90) else bytes(len(code))) for kind, at, code in entries]
    magic = (0xBA55ED50).to_bytes(4, "little")
    start, end = b"host" + magic + b"not a container", magic + b"cmp" * 9
    library = start + fatbin(*entries) + b"host" + fatbin((2, 75, b"d" * 8)) + end
    kept = start + fatbin(*others) + b"host" + fatbin((2, 75, bytes(8))) + end
    assert gpu_wheels.code_for(90, library) == kept


def test_a_part_of_a_package_needs_nothing_and_has_nothing_else(tmp_path: Path) -> None:
    part = next(wheel for wheel in WHEELS if wheel.part)
    files = {"vllm/_C.abi3.so": b"x" + fatbin((2, 80, b"a" * 40)), "vllm/_moe_C.abi3.so": b"y", "vllm/__init__.py": b""}
    path = wheel(tmp_path, part.name, "Requires-Dist: much\n", files)
    gpu_wheels.trim(path, part)
    assert gpu_wheels.missing([path]) == []
    with zipfile.ZipFile(path) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == {"vllm/_C.abi3.so"}
        assert archive.read("vllm/_C.abi3.so") == b"x" + fatbin((2, 80, bytes(40)))
        record = archive.read(f"{part.name}-1.0.dist-info/RECORD").decode()
    assert [line.split(",")[0] for line in record.splitlines()] == [
        "vllm/_C.abi3.so",
        f"{part.name}-1.0.dist-info/METADATA",
    ]


def test_what_a_wheel_needs_and_nobody_has_is_told(tmp_path: Path) -> None:
    needs = (
        "torch>=2.7",
        "other-thing>=1",
        "absent.thing<3",
        'tool; extra == "dev"',
        'winlib; sys_platform == "win32"',
    )
    one = wheel(tmp_path, "one", "".join(f"Requires-Dist: {need}\n" for need in needs))
    assert gpu_wheels.missing([one]) == ["one needs other-thing>=1", "one needs absent.thing<3"]
    assert gpu_wheels.missing([one, wheel(tmp_path, "other_thing")]) == ["one needs absent.thing<3"]


def test_the_wheel_of_a_dry_run_installs(tmp_path: Path) -> None:
    gpu_wheels.main([str(tmp_path / "wheels"), "--empty"])
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", tmp_path / "site"]
    done = subprocess.run([*command, *(tmp_path / "wheels").glob("*.whl")], capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        pytest.skip("needs pip")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["nothing-0.dist-info"]


# --- the check


def site(folder: Path, *names: str) -> Path:
    (folder / "nybble").mkdir()
    for name in names:
        for path in PACKAGE.glob(f"{name}.*.so"):
            (folder / "nybble" / path.name).symlink_to(path)
    return folder


def test_the_extensions_of_this_installation_load_without_torch(tmp_path: Path) -> None:
    """In a process of its own: an extension cannot be loaded twice."""
    if not list(PACKAGE.glob("_cuda.*.so")):
        pytest.skip("the CUDA kernels are not built")
    program = """
import sys
from importlib import util
from pathlib import Path
spec = util.spec_from_file_location("check", sys.argv[1])
check = util.module_from_spec(spec)
spec.loader.exec_module(check)
print(*check.check(Path(sys.argv[2])), "torch" in sys.modules)
"""
    command = [sys.executable, "-c", program, gpu_wheels_check.__file__, site(tmp_path, "_C", "_cuda")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "_C and _cuda load, with " in done.stdout
    assert done.stdout.endswith("False\n")


def test_a_wheel_without_an_extension_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="_C: must be one file in the wheel"):
        gpu_wheels_check.check(site(tmp_path))


def test_one_that_does_not_load_is_refused(tmp_path: Path) -> None:
    (site(tmp_path) / "nybble" / "_C.abi.so").write_bytes(b"not a library")
    with pytest.raises(ImportError):
        gpu_wheels_check.check(tmp_path)
