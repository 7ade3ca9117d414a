"""The files of tests/data/fuzz, of which each takes a reader through other lines."""

from __future__ import annotations

import zipfile
from pathlib import Path

KEPT = Path(__file__).parents[1] / "tests" / "data" / "fuzz"


def kept(name: str) -> list[bytes]:
    """Those of a reader; none before there are any."""
    path = KEPT / f"{name}.zip"
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as archive:
        return [archive.read(member) for member in archive.namelist()]
