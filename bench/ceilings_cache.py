"""Keeps measured ceilings between runs: one JSON file for a thread count of this CPU, in the user's cache directory.

A file that is not whole, or of another machine, version or schema, is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .. import __version__, native
from . import atomic

SCHEMA = 1  # raised when the meaning of a limit changes
_MOST = 1e9  # 10^18 a second: no machine


def directory() -> Path:
    """XDG_CACHE_HOME, if it is absolute, or ~/.cache; then nybble."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "nybble"


def _key(threads: int) -> dict[str, Any]:
    brand, features = native.cpu()
    return {"schema": SCHEMA, "version": __version__, "cpu": brand, "features": list(features), "threads": threads}


def path_of(threads: int) -> Path:
    """Where the ceilings of this machine with so many threads lie."""
    text = json.dumps(_key(threads), sort_keys=True)
    return directory() / f"ceilings-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def load(threads: int, names: Collection[str]) -> dict[str, float] | None:
    """What was kept, or None: exactly the limits of these names, all positive numbers."""
    try:
        found = json.loads(path_of(threads).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("key") != _key(threads):
        return None
    limits = found.get("limits")
    if not isinstance(limits, dict) or limits.keys() != set(names) or not all(map(_is_rate, limits.values())):
        return None
    return {name: float(limits[name]) for name in names}


def _is_rate(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _MOST


def store(found: Mapping[int, Mapping[str, float]]) -> None:
    """Keeps the limits of each thread count; warns, once, where the directory cannot be written."""
    try:
        directory().mkdir(mode=0o700, parents=True, exist_ok=True)
        for threads, limits in found.items():
            text = json.dumps({"key": _key(threads), "limits": limits}, indent=1)
            atomic.write(path_of(threads), text.encode())
    except OSError as error:
        warnings.warn(f"the ceilings of this machine are not kept: {error}", RuntimeWarning, stacklevel=2)
