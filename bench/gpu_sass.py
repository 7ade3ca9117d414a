"""Disassembles compiled GPU kernels (SASS), from the extension or from a cubin.

The length of the main loop shows the cost of a tile without a GPU. Needs `cuobjdump`, from the CUDA toolkit or Triton.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

_FUNCTION = re.compile(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", re.DOTALL)
# "/*0a30*/   @!P0 IMMA.16832.S8.S8 R4, ...;"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;")
_BRANCH = re.compile(r"\bBRA (?:\w+, )*0x([0-9a-f]+)")


def cuobjdump() -> str | None:
    """The path of the disassembler; None if it is not installed."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(bundled) if bundled and bundled.exists() else None


def extension() -> Path | None:
    """The file of nybble._cuda, without loading it; None if it is not built."""
    found = find_spec("nybble._cuda")
    return Path(found.origin) if found and found.origin else None


def functions(binary: Path, arch: str | None = None) -> dict[str, str]:
    """Mangled name -> disassembly, for all kernels of a cubin, or of a library for an architecture such as "sm_90a".

    Raises:
        RuntimeError: cuobjdump is not installed, or cannot read the file.
    """
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump is not installed: it comes with the CUDA toolkit and with Triton's wheel")
    command = [tool, "-sass", *(["-arch", arch] if arch else []), str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise RuntimeError(f"{binary}: {done.stderr.strip() or done.stdout.strip()}")
    return dict(_FUNCTION.findall(done.stdout))


def instructions(sass: str) -> list[tuple[int, str]]:
    """Address and text of each instruction of a function, in order."""
    return [(int(at, 16), text) for at, text in _INSTRUCTION.findall(sass)]


def loops(sass: str) -> list[list[str]]:
    """The instructions of each loop of a function, from the target of a backward branch to the branch, including inner
    loops; the longest last."""
    code = instructions(sass)
    found = []
    for end, text in code:
        target = _BRANCH.search(text)
        if target and int(target[1], 16) < end:
            begin = int(target[1], 16)
            found.append([inner for at, inner in code if begin <= at <= end])
    return sorted(found, key=len)
