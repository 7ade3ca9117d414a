"""Whether the folder of gpu_prepare.sh would do: it is installed, and its compiled parts are loaded, without torch.

python -m bench.gpu_wheels_check DIR      in the sources
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
# Which files of the peers are compiled, and must load here as well. The others of theirs want a driver or torch.
PROGRAMS = ("nvidia/cu13/bin/compute-sanitizer",)


def load(path: Path) -> Any:
    """An extension module by its file, without the package around it.

    Raises:
        ImportError: it is for another Python, or lacks a library.
    """
    name = path.name.split(".")[0]
    loader = ExtensionFileLoader(name, str(path))
    spec = spec_from_loader(name, loader)
    assert spec is not None, "there is a loader"  # noqa: S101
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def check(site: Path) -> list[str]:
    """Lines about what was installed in a folder.

    Raises:
        ImportError: an extension of nybble's does not load.
        ValueError: one is missing, or has not every CUDA kernel.
    """
    modules = {}
    for name in ("_C", "_cuda"):
        files = sorted(site.glob(f"nybble/{name}.*.so"))
        if len(files) != 1:
            raise ValueError(f"{name}: {len(files)} files in the wheel, must be one: {[file.name for file in files]}")
        modules[name] = load(files[0])
    versions = {module.version for module in modules.values()}
    if len(versions) != 1:
        raise ValueError(f"_C and _cuda are of versions {sorted(versions)}")
    rows = modules["_C"].cuda_kernel_table()
    absent = [row["name"] for row in rows if not row["built"]]
    if absent or not rows:
        raise ValueError(f"CUDA kernels that were not built: {', '.join(absent) or 'all'}")
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
