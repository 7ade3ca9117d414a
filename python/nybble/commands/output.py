"""The directory that a command writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import CommandFailed


def check_out(out: Path) -> None:
    """Raises CommandFailed unless the directory is new or empty."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CommandFailed(f"--out {out}: exists and is not an empty directory")


@contextmanager
def written_at_once(out: Path) -> Iterator[Path]:
    """A temporary directory to write to; it becomes ``out`` in one step, or is removed after an exception."""
    aside = out.with_name(f".{out.name}-{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    try:
        yield aside
        os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
