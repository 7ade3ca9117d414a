"""Checks the folder made by gpu_prepare.sh: installs its wheels, and loads their compiled modules without torch.

python -m bench.gpu_wheels_check DIR      (from the source tree)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TRAVELS_MIB = 64.0
# Programs from the wheels that must run here. Other compiled files need a driver or torch.
PROGRAMS = ("nvidia/cu13/bin/compute-sanitizer",)


def load(path: Path) -> Any:
    """Loads an extension module from a file, without its package.

    Raises:
        ImportError: it is for another Python version, or a library is missing.
    """
    name = path.name.split(".")[0]
    loader = ExtensionFileLoader(name, str(path))
    spec = spec_from_loader(name, loader)
    assert spec is not None, "the loader is given"  # noqa: S101
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def check(site: Path) -> list[str]:
    """Checks an installation in a folder; returns lines about it.

    Raises:
        ImportError: an extension of nybble does not load.
        ValueError: an extension or a CUDA kernel is missing.
    """
    modules = {}
    for name in ("_C", "_cuda"):
        files = sorted(site.glob(f"nybble/{name}.*.so"))
        if len(files) != 1:
            raise ValueError(f"{name}: must be one file in the wheel, found {[file.name for file in files]}")
        modules[name] = load(files[0])
    versions = {module.version for module in modules.values()}
    if len(versions) != 1:
        raise ValueError(f"_C and _cuda must have the same version, found {sorted(versions)}")
    rows = modules["_C"].cuda_kernel_table()
    absent = [row["name"] for row in rows if not row["built"]]
    if absent or not rows:
        raise ValueError(f"CUDA kernels not built: {', '.join(absent) or 'all'}")
    lines = [f"nybble {versions.pop()}: _C and _cuda load, with {len(rows)} CUDA kernels"]
    for program in PROGRAMS:
        if (site / program).is_file():
            done = subprocess.run(  # noqa: S603
                [site / program, "--version"], capture_output=True, text=True, timeout=60, check=False
            )
            said = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()
            lines.append(f"{Path(program).name} says: {said[-1]}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu_wheels_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    options = parser.parse_args(argv)
    wheels = sorted(options.folder.glob("*.whl"))
    with TemporaryDirectory() as site:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target"]
        subprocess.run([*command, site, *wheels], check=True)  # noqa: S603
        try:
            lines = check(Path(site))
        except (ImportError, ValueError) as error:
            print(f"gpu_wheels_check: {error}", file=sys.stderr)
            return 1
    print(*lines, sep="\n")
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file()) / 2**20
    own = sum(wheel.stat().st_size for wheel in wheels if wheel.name.startswith("nybble-")) / 2**20
    print(f"prepared: {len(wheels)} wheels, {size:.1f} MiB of {TRAVELS_MIB:.0f}, of them nybble {own:.1f} MiB")
    return 0 if size < TRAVELS_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
