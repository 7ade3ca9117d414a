"""The machine and software of a measurement: CPU, caches, versions, commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any

from .. import __version__, native
from ..dispatch import targets

_LIBRARIES = (
    *("torch", "numpy", "transformers", "sentence-transformers", "torchao", "onnx", "onnxruntime", "openvino", "nncf"),
    *("llama-cpp-python", "bitsandbytes", "scipy"),
)
_ROOT = Path(__file__).resolve().parent.parent


def last_level_cache() -> int:
    """Bytes of the last-level cache."""
    return native.caches().l3


def commit(root: Path = _ROOT) -> str | None:
    """The commit checked out at `root`; None for an installed wheel."""
    git = root / ".git"
    if git.is_file():  # a worktree
        git = (root / git.read_text().removeprefix("gitdir:").strip()).resolve()
    if not (git / "HEAD").is_file():
        return None
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    ref = head.removeprefix("ref: ")
    shared = git / "commondir"
    common = (git / shared.read_text().strip()).resolve() if shared.is_file() else git
    if (common / ref).is_file():
        return (common / ref).read_text().strip()
    packed = common / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {ref}")), None)


def versions() -> dict[str, str]:
    """Versions of Python, nybble and the installed peer libraries."""
    found = {"python": python_version(), "nybble": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def run_line(
    threads: Sequence[int], ceilings: dict[str, Any], preset: str | None, mark: Mapping[str, Any]
) -> dict[str, Any]:
    """The first line of a result file. mark: fields that every line of the run has."""
    machine = targets.detect()
    return {
        "kind": "run",
        "preset": preset,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": machine.cpu,
        "targets": list(machine.targets),
        "cap": machine.cap,
        "threads": list(threads),
        "versions": versions(),
        "ceilings": ceilings,
        **mark,
    }
