"""The wheels that a machine with a GPU and without a network is given, and how they are made small enough to travel.

    python -m bench.gpu_wheels DIR [--most MIB] [--empty]      in the sources

Collects them in DIR, beside nybble's own, for the Python that runs this, and says what each needs that neither DIR nor the
machine has. --empty: puts a wheel of nothing there instead, for dry runs. Imports the standard library alone: it runs where
torch is not installed.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

from .arguments import amount, argument

MOST_MIB = 60.0  # a working tree travels with at most 64


@dataclass(frozen=True)
class Wheel:
    """requirement: as pip takes it; why: what it is for; module: of a peer, what is imported; drop: files that the machine
    has no use for, a pattern; part: it is not the package any more, and what that needs is not needed; capability: of the
    only GPUs whose machine code is kept, 90 for 9.0."""

    requirement: str
    why: str
    module: str | None = None
    drop: str | None = None
    part: bool = False
    capability: int | None = None

    @property
    def name(self) -> str:
        """As in the name of a wheel's file."""
        return _normal(re.split(r"[<>=!~]", self.requirement)[0])


# The most useful first: what would exceed the size is left out.
WHEELS = (
    Wheel("safetensors", "humming needs it"),
    Wheel("tabulate", "humming needs it"),
    Wheel("tqdm", "gemlite and humming need it"),
    Wheel("gemlite", "peer", "gemlite"),
    Wheel("humming-kernels", "peer; compiles with the NVRTC and the headers that come with torch", "humming"),
    Wheel("torchao", "peer", "torchao"),
    Wheel("nvidia-cuda-sanitizer-api==13.0.*", "compute-sanitizer", drop=r"/docs/"),
    # Of the version that is compiled for the torch of the machine, the library that has Marlin, for Hopper.
    Wheel(
        "vllm==0.20.2",
        "peer: Marlin alone",
        "vllm",
        drop=r"^(?!vllm/_C\.abi3\.so|[^/]+\.dist-info/(METADATA|WHEEL|RECORD|licenses/))",
        part=True,
        capability=90,
    ),
    Wheel("bitsandbytes", "peer", "bitsandbytes", drop=r"libbitsandbytes_(cuda11|cuda12|rocm|xpu)"),
)
# What comes with torch there, and what torch's wheels bring along.
ON_THE_MACHINE = frozenset(
    "torch triton numpy jinja2 markupsafe sympy mpmath networkx fsspec filelock typing-extensions setuptools packaging "
    "cuda-bindings cuda-pathfinder".replace("-", "_").split()
)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name.strip()).lower()


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 2**20


def collect(wheel: Wheel, folder: Path, most: float) -> str:
    """Adds a wheel to the folder if it fits, and says in a line what became of it."""
    part = folder / ".part"
    part.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(  # noqa: S603
        [*command, "-w", part, wheel.requirement], capture_output=True, text=True, check=False
    )
    found = sorted(part.glob("*.whl"))
    try:
        if done.returncode != 0 or len(found) != 1:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel"]
            return f"left out {wheel.requirement}: pip: {lines[-1]}"
        trim(found[0], wheel)
        size = found[0].stat().st_size / 2**20
        if _size(folder) + size > most:
            return f"left out {wheel.requirement}: {size:.1f} MiB, more than are left of {most:.0f}"
        found[0].replace(folder / found[0].name)
        return f"carried  {found[0].name}  {size:.1f} MiB  ({wheel.why})"
    finally:
        for path in part.iterdir():
            path.unlink()
        part.rmdir()


def trim(path: Path, wheel: Wheel) -> None:
    """Takes out of a wheel's file, and off the list that it has of its files, what the machine has no use for."""
    if wheel.drop is None:
        return
    whole = path.with_suffix(".whole")
    path.replace(whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            if re.search(wheel.drop, entry.filename):
                continue
            data = source.read(entry)
            if entry.filename.endswith(".so") and wheel.capability:
                data = code_for(wheel.capability, data)
            elif entry.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(line for line in lines if not re.search(wheel.drop, line)).encode()
            target.writestr(entry, data)
    whole.unlink()


_FATBIN, _ENTRY = struct.Struct("<IHHQ"), struct.Struct("<HHIQIIHHI")
_MAGIC, _MACHINE_CODE = 0xBA55ED50, 2


def code_for(capability: int, library: bytes) -> bytes:
    """A library of nvcc's with the GPU code for all others zeroed, which then takes no room in a wheel.

    The driver takes the code that fits the GPU best, and reads no other. A container ("fatbin") is a header (magic, version,
    its size, bytes that follow) and entries: a header (kind, version, its size, bytes that follow, and at last the
    capability) and the code, 2 being machine code.
    """
    changed, at = bytearray(library), 0
    magic = _MAGIC.to_bytes(4, "little")
    while (at := library.find(magic, at)) >= 0:
        _, version, header, size = _FATBIN.unpack_from(library, at)
        if (version, header) != (1, _FATBIN.size):  # these four bytes are something else
            at += 1
            continue
        at, end = at + header, at + header + size
        while at < end:
            kind, _, header, size, *_, found = _ENTRY.unpack_from(library, at)
            if (kind, found) != (_MACHINE_CODE, capability):
                changed[at + header : at + header + size] = bytes(size)
            at += header + size
    return bytes(changed)


def empty(folder: Path) -> None:
    """A wheel that any Python installs, and that has nothing in it."""
    files = {
        "METADATA": "Metadata-Version: 2.1\nName: nothing\nVersion: 0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    listed = "".join(f"nothing-0.dist-info/{name},,\n" for name in (*files, "RECORD"))
    with zipfile.ZipFile(folder / "nothing-0-py3-none-any.whl", "w") as archive:
        for name, text in {**files, "RECORD": listed}.items():
            archive.writestr(f"nothing-0.dist-info/{name}", text)


def missing(wheels: Iterable[Path]) -> list[str]:
    """What each wheel needs, extras and other systems aside, that neither the others nor the machine have."""
    wheels = list(wheels)
    there = ON_THE_MACHINE | {_normal(path.name.split("-")[0]) for path in wheels}
    parts = {wheel.name for wheel in WHEELS if wheel.part}
    found = []
    for path in wheels:
        if _normal(path.name.split("-")[0]) in parts:
            continue
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            metadata = message_from_string(archive.read(name).decode())
        for line in metadata.get_all("Requires-Dist") or []:
            requirement, _, marker = line.partition(";")
            needed = _normal(re.match(r"[\w.-]+", requirement)[0])  # type: ignore[index]
            if needed not in there and not re.search("extra|win32|Windows", marker):
                found.append(f"{path.name.split('-')[0]} needs {requirement.strip()}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu_wheels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--most", type=argument(amount), default=MOST_MIB, metavar="MIB", help="of all that is in DIR")
    parser.add_argument("--empty", action="store_true", help="a wheel of nothing alone")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.empty:
        empty(options.folder)
        return 0
    for wheel in WHEELS:
        if any(_normal(path.name.split("-")[0]) == wheel.name for path in options.folder.glob("*.whl")):
            print(f"there    {wheel.requirement}")
            continue
        print(collect(wheel, options.folder, options.most), flush=True)
    for line in missing(sorted(options.folder.glob("*.whl"))):
        print(f"lacks    {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
