"""What contestants write before they are loaded: each in a folder of its own, by a process of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..apart import apart
from .contestant import Contestant
from .subject import Subject
from .suites import find

# A folder in which the files of runs are kept and found again, instead of one that is deleted. Converting takes minutes.
FILES = "NYBBLE_BENCH_FILES"


@contextmanager
def room() -> Iterator[Path]:
    """The folder of all files of a run."""
    if kept := os.environ.get(FILES):
        Path(kept).mkdir(parents=True, exist_ok=True)
        yield Path(kept)
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)


def prepared(root: Path, subject: Subject, contestant: Contestant, threads: int) -> Path:
    """The folder of a contestant's files, which are written if they are not there.

    Raises:
        RuntimeError, ValueError, ChildProcessError: they cannot be written.
    """
    folder = root / _slug(subject.name) / _slug(contestant.name)
    if contestant.prepare is not None and not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        apart(partial(_write, str(folder), subject.name), contestant.name, threads)
    return folder


def _write(folder: str, subject: str, name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model = find(subject)
    prepare = model.by_name(name).prepare
    assert prepare is not None, "asked for by prepared()"  # noqa: S101
    with TemporaryDirectory(dir=Path(folder).parent) as unfinished:
        inner = Path(unfinished, "files")
        inner.mkdir()
        prepare(model.subject, inner)
        inner.rename(folder)


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower())


def megabytes(folder: Path) -> float:
    """The size of all files in a folder, in 10^6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
