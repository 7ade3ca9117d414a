"""Plants the bugs of this folder, one at a time, in a copy of the sources and runs the tests: do they notice?

    python tests/mutations/run.py                      # all patches, by the fast tests; at least 90 % must be found
    python tests/mutations/run.py --tests full         # by the full tests; all must be found
    python tests/mutations/run.py cpu_w8a8_offset      # some of them

Each patch begins with what is wrong and the test file that is likely to notice. That file runs first; where it passes,
all tests of the level do. They must all pass before anything is planted. Needs git, cmake, ninja, a C++ compiler and
the extra `test`. The checkout stays as it is.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEAST = {"fast": 0.9, "full": 1.0}
_FILES = re.compile(r"^\+\+\+ b/(\S+)", re.MULTILINE)
_HINT = re.compile(r"^Found by: (.+)$", re.MULTILINE)


class Mutation(NamedTuple):
    """A planted bug: its patch, what is wrong, the files that it changes, and the tests to run first."""

    path: Path
    what: str
    files: tuple[str, ...]
    hint: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def is_compiled(self) -> bool:
        """Whether the extension for CPUs must be built again."""
        return any(file.startswith("csrc/") and not file.startswith("csrc/cuda/") for file in self.files)


def mutations() -> list[Mutation]:
    """All patches of this folder."""
    found = []
    for path in sorted(HERE.glob("*.patch")):
        text = path.read_text(encoding="utf-8")
        hint = _HINT.search(text)
        found.append(
            Mutation(path, text.splitlines()[0], tuple(_FILES.findall(text)), tuple(hint[1].split()) if hint else ())
        )
    return found


class Copy:
    """A copy of the tracked sources that imports without being installed, and its own build folder."""

    def __init__(self, folder: Path) -> None:
        self.root, self._build = folder / "nybble", folder / "build"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)  # noqa: S607
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)
        self._package = self.root / "python" / "nybble"
        for name in ("kernels", "bench"):
            (self._package / name).symlink_to(self.root / name)
        self._copy_cuda()
        info = self._package.parent / "nybble-0.1.0.dist-info"  # as if it were installed
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nybble\nVersion: 0.1.0\n")
        self._configure()

    def _copy_cuda(self) -> None:
        """The CUDA extension of the nybble that is installed, if it has one: patches leave it as it is."""
        spec = find_spec("nybble")
        for place in spec.submodule_search_locations or () if spec else ():
            for library in Path(place).glob("_cuda*.so"):
                shutil.copy2(library, self._package)

    def _configure(self) -> None:
        import pybind11

        command = ["cmake", "-G", "Ninja", "-S", self.root, "-B", self._build, "-DNYBBLE_CUDA=OFF"]
        command += ["-DCMAKE_BUILD_TYPE=Release", "-DSKBUILD_PROJECT_VERSION=0.1.0"]
        command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
        _quietly(command, self.root)
        self.build()

    def build(self) -> None:
        """Compiles what has changed."""
        _quietly(["cmake", "--build", self._build], self.root)
        shutil.copy2(self._build / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", self._package)

    def apply(self, mutation: Mutation, *options: str) -> None:
        """Applies a patch, or with -R takes it back."""
        _quietly(["git", "apply", *options, mutation.path], self.root)

    def test(self, *arguments: str) -> str | None:
        """Runs tests: the first that fails, or None."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"PYTHONPATH": str(self._package.parent), "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
        command.append("--ignore=tests/test_mutations.py")  # it would notice that a patch is applied already
        done = subprocess.run(command, cwd=self.root, env=environment, check=False, capture_output=True, text=True)
        if done.returncode in (0, 5):  # passed, or a file without tests of this level
            return None
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        if done.returncode not in (1, 2) or not failed:  # 2: pytest-xdist, stopped by -x
            raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return failed[1]


def _quietly(command: list[object], folder: Path) -> None:
    parts = [str(part) for part in command]
    done = subprocess.run(parts, cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(parts)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def check(copy: Copy, mutation: Mutation, level: str) -> str | None:
    """The test that notices a planted bug, or None."""
    copy.apply(mutation)
    try:
        if mutation.is_compiled:
            copy.build()
        hint = copy.test("--tests", level, "-n", "0", *mutation.hint) if mutation.hint else None
        return hint or copy.test("--tests", level)
    finally:
        copy.apply(mutation, "-R")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="patches, without .patch; default: all")
    parser.add_argument("--tests", choices=tuple(LEAST), default="fast", help="the tests that must notice")
    arguments = parser.parse_args()
    every = mutations()
    unknown = set(arguments.names) - {one.name for one in every}
    if unknown:
        parser.error(f"names={sorted(unknown)}: must be of {', '.join(one.name for one in every)}")
    chosen = [one for one in every if one.name in arguments.names or not arguments.names]
    found = 0
    with tempfile.TemporaryDirectory(prefix="nybble-mutations-") as folder:
        copy, compiled = Copy(Path(folder)), False
        if failed := copy.test("--tests", arguments.tests):
            print(f"without a planted bug {failed} fails: nothing can be said")
            return 1
        for mutation in chosen:
            if compiled and not mutation.is_compiled:
                copy.build()  # what the bug before this one left
            compiled = mutation.is_compiled
            start = time.monotonic()
            test = check(copy, mutation, arguments.tests)
            found += test is not None
            seconds = time.monotonic() - start
            print(
                f"{mutation.name:32} {'found' if test else 'SURVIVES'} {seconds:5.0f} s  {test or mutation.what}",
                flush=True,
            )
    print(f"{found} of {len(chosen)} planted bugs found by the {arguments.tests} tests")
    return 0 if found >= LEAST[arguments.tests] * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
