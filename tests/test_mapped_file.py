"""Which symbolic links of a checkpoint are followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.checkpoint.files import CheckpointError
from nybble.foreign.mapped import MappedFile


def link(root: Path, name: str, to: str) -> Path:
    """A link at ``root / name`` to the file ``root / to``, which holds ten bytes."""
    target, path = root / to, root / name
    for one in (target, path):
        one.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"0123456789")
    path.symlink_to(target)
    return path


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("model/a.gguf", "model/b.gguf"),
        ("model/a.gguf", "model/inner/b.gguf"),
        ("models--o--n/snapshots/1f/a.gguf", "models--o--n/blobs/77"),
        ("models--o--n/snapshots/1f/q4/inner/a.gguf", "models--o--n/blobs/77"),
    ],
)
def test_links_within_a_directory_and_of_the_cache_are_followed(tmp_path: Path, name: str, to: str) -> None:
    assert MappedFile(link(tmp_path, name, to)).size == 10


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("model/a.gguf", "b.gguf"),
        ("model/a.gguf", "blobs/77"),
        ("models--o--n/snapshots/1f/a.gguf", "models--o--other/blobs/77"),
        ("models--o--n/snapshots/1f/a.gguf", "models--o--n/refs/77"),
    ],
)
def test_links_elsewhere_are_refused(tmp_path: Path, name: str, to: str) -> None:
    with pytest.raises(CheckpointError, match=r"a\.gguf: a link out of its directory is not followed"):
        MappedFile(link(tmp_path, name, to))
