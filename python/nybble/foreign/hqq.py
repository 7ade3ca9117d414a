"""HQQ: known, so that the reason can be said why it is not read."""

from __future__ import annotations

from ..checkpoint.files import CheckpointError
from .opened import Opened
from .source import Source

_FILE = "qmodel.pt"


def detect(source: Source) -> bool:
    return source.has(_FILE) or source.method == "hqq"


def read_file(source: Source) -> Opened:
    raise CheckpointError(
        f"{source.path}: {_FILE}: HQQ saves a pickle, which can run code when it is read; nybble reads none. "
        "Load it with hqq, and save the dense model with save_pretrained, then quantize that"
    )
