"""The wheels that a machine with a GPU and without a network is given: what is carried, what is not and why.

    python -m bench.gpu_wheels DIR [--most MIB] [--empty]      in the sources

Collects them in DIR, beside nybble's own, for the Python that runs this, and says what each needs that neither DIR nor the
machine has. --empty: puts a wheel of nothing there instead, for dry runs. Imports the standard library alone: it runs where
torch is not installed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

MOST_MIB = 60.0  # a working tree travels with at most 64


@dataclass(frozen=True)
class Wheel:
    """requirement: as pip takes it; why: what it is for; module: of a peer, what is imported; drop: files that the machine
    has no use for, a pattern."""

    requirement: str
    why: str
    module: str | None = None
    drop: str | None = None

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
    Wheel("bitsandbytes", "peer", "bitsandbytes", drop=r"libbitsandbytes_(cuda11|cuda12|rocm|xpu)"),
)
# Peers that are worth comparing with and cannot be carried.
LEFT_OUT = {
    "marlin w4a16 g128": "no wheel: marlin-kernels and gptqmodel are published as sources alone, which nvcc compiles for "
    "minutes against the torch of the machine; the wheels of vllm and sgl-kernel exceed what travels",
}
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
        if wheel.drop:
            without(found[0], wheel.drop)
        size = found[0].stat().st_size / 2**20
        if _size(folder) + size > most:
            return f"left out {wheel.requirement}: {size:.1f} MiB, more than are left of {most:.0f}"
        found[0].replace(folder / found[0].name)
        return f"carried  {found[0].name}  {size:.1f} MiB  ({wheel.why})"
    finally:
        for path in part.iterdir():
            path.unlink()
        part.rmdir()


def without(wheel: Path, pattern: str) -> None:
    """Takes the files whose name matches out of a wheel, and out of the list that it has of them."""
    whole = wheel.with_suffix(".whole")
    wheel.replace(whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            if re.search(pattern, entry.filename):
                continue
            data = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(line for line in lines if not re.search(pattern, line)).encode()
            target.writestr(entry, data)
    whole.unlink()


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
    found = []
    for path in wheels:
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
    parser.add_argument("--most", type=float, default=MOST_MIB, metavar="MIB", help="of all that is in DIR")
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
    for name, why in LEFT_OUT.items():
        print(f"left out {name}: {why}")
    for line in missing(sorted(options.folder.glob("*.whl"))):
        print(f"lacks    {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
