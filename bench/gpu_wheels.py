"""Collects the wheels for benchmarks on a GPU machine without a network, and shrinks them to fit a size limit.

    python -m bench.gpu_wheels DIR [--most MIB] [--empty]      (from the source tree)

Downloads them to DIR, next to nybble's wheel, for the running Python version, and lists dependencies that neither DIR nor
the GPU machine has. --empty: only creates an empty wheel, for dry runs. Imports only the standard library, because torch
may not be installed.
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

MOST_MIB = 60.0  # a little below gpu_wheels_check.TRAVELS_MIB


@dataclass(frozen=True)
class Wheel:
    """A wheel to collect.

    requirement: in pip's syntax. why: its purpose. module: for a peer, the module to import. drop: pattern of files to
    remove. part: only a part of the package remains, whose dependencies are not needed. capability: keep GPU machine code
    only for this compute capability; 90 means 9.0.
    """

    requirement: str
    why: str
    module: str | None = None
    drop: str | None = None
    part: bool = False
    capability: int | None = None

    @property
    def name(self) -> str:
        """The normalized name, as in a wheel's file name."""
        return _normal(re.split(r"[<>=!~]", self.requirement)[0])


# The most useful first: wheels that would exceed the size limit are left out.
WHEELS = (
    Wheel("safetensors", "humming needs it"),
    Wheel("tabulate", "humming needs it"),
    Wheel("tqdm", "gemlite and humming need it"),
    Wheel("gemlite", "peer", "gemlite"),
    Wheel("humming-kernels", "peer; compiles with the NVRTC and the headers that come with torch", "humming"),
    Wheel("torchao", "peer", "torchao"),
    Wheel("nvidia-cuda-sanitizer-api==13.0.*", "compute-sanitizer", drop=r"/docs/"),
    # The library with Marlin, for Hopper, in the version compiled for the GPU machine's torch.
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
# Packages on the GPU machine: torch and its dependencies.
ON_THE_MACHINE = frozenset(
    "torch triton numpy jinja2 markupsafe sympy mpmath networkx fsspec filelock typing-extensions setuptools packaging "
    "cuda-bindings cuda-pathfinder".replace("-", "_").split()
)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name.strip()).lower()


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 2**20


def collect(wheel: Wheel, folder: Path, most: float) -> str:
    """Downloads a wheel to the folder if it fits; returns one line about the result."""
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
            return f"left out {wheel.requirement}: {size:.1f} MiB exceed the limit of {most:.0f} in all"
        found[0].replace(folder / found[0].name)
        return f"added    {found[0].name}  {size:.1f} MiB  ({wheel.why})"
    finally:
        for path in part.iterdir():
            path.unlink()
        part.rmdir()


def trim(path: Path, wheel: Wheel) -> None:
    """Removes unneeded files from a wheel and from its RECORD."""
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
    """A library compiled by nvcc, with GPU code for other compute capabilities zeroed, so that it compresses to nothing.

    The driver loads only the code that fits the GPU best. A container ("fatbin") has a header (magic, version, header size,
    payload size) and entries: a header (kind, version, header size, payload size, ..., capability) and code; kind 2 is
    machine code.
    """
    changed, at = bytearray(library), 0
    magic = _MAGIC.to_bytes(4, "little")
    while (at := library.find(magic, at)) >= 0:
        _, version, header, size = _FATBIN.unpack_from(library, at)
        if (version, header) != (1, _FATBIN.size):  # not a fatbin: the magic number occurred by chance
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
    """Creates an empty wheel that any Python can install."""
    files = {
        "METADATA": "Metadata-Version: 2.1\nName: nothing\nVersion: 0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    listed = "".join(f"nothing-0.dist-info/{name},,\n" for name in (*files, "RECORD"))
    with zipfile.ZipFile(folder / "nothing-0-py3-none-any.whl", "w") as archive:
        for name, text in {**files, "RECORD": listed}.items():
            archive.writestr(f"nothing-0.dist-info/{name}", text)


def missing(wheels: Iterable[Path]) -> list[str]:
    """Dependencies of the wheels, without extras and other systems, that neither they nor the GPU machine provide."""
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
    parser.add_argument("--most", type=argument(amount), default=MOST_MIB, metavar="MIB", help="size limit of DIR")
    parser.add_argument("--empty", action="store_true", help="only create an empty wheel")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.empty:
        empty(options.folder)
        return 0
    for wheel in WHEELS:
        if any(_normal(path.name.split("-")[0]) == wheel.name for path in options.folder.glob("*.whl")):
            print(f"exists   {wheel.requirement}")
            continue
        print(collect(wheel, options.folder, options.most), flush=True)
    for line in missing(sorted(options.folder.glob("*.whl"))):
        print(f"missing  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
