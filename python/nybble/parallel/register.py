"""Registers nybble's layers and ops with torch.distributed.tensor."""

from __future__ import annotations

from torch.distributed.tensor.parallel import style

from . import rules, styles
from .cut import INPUTS, OUTPUTS

_done: list[bool] = []


def register() -> None:
    """Once in a process; it is called when torch's parallel styles have been imported."""
    if not _done:
        styles.teach(style.ColwiseParallel, OUTPUTS)
        styles.teach(style.RowwiseParallel, INPUTS)
        rules.register()
        _done.append(True)
