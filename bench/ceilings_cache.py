"""Caches measured ceilings: one JSON file per CPU and thread count, in the user's cache directory.

A file that is damaged, or from another machine, version, schema or NYBBLE_TARGET, is ignored.
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
from ..dispatch import targets
from . import atomic

SCHEMA = 2  # increased when the meaning of a limit changes
_MOST = 1e9  # upper bound of a plausible rate, 10^18 per second


def directory() -> Path:
    """The folder nybble in XDG_CACHE_HOME, if that is absolute, else in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "nybble"


def _key(threads: int) -> dict[str, Any]:
    brand, features, _ = native.cpu()
    return {
        "schema": SCHEMA,
        "version": __version__,
        "cpu": brand,
        "features": list(features),
        "targets": list(targets.detect().targets),
        "threads": threads,
    }


def path_of(threads: int) -> Path:
    """The file with the ceilings of this machine for a number of threads."""
    text = json.dumps(_key(threads), sort_keys=True)
    return directory() / f"ceilings-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def load(threads: int, names: Collection[str]) -> dict[str, float] | None:
    """The cached limits; None unless the file has exactly these names, with positive numbers."""
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
    """Stores the limits of each thread count; warns if the directory cannot be written."""
    try:
        directory().mkdir(mode=0o700, parents=True, exist_ok=True)
        for threads, limits in found.items():
            text = json.dumps({"key": _key(threads), "limits": limits}, indent=1)
            atomic.write(path_of(threads), text.encode())
    except OSError as error:
        warnings.warn(f"cannot cache the ceilings of this machine: {error}", RuntimeWarning, stacklevel=2)
