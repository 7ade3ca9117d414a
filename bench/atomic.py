"""Atomic file writes."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoint.files import file_at_once


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Writes a file such that readers see either the old or the new contents, even on failure. Raises OSError."""
    with file_at_once(path) as aside, open(aside, "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())
