"""Silence for what other libraries say when they are imported, which is about GPUs."""

from __future__ import annotations

import logging

_CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")


def quiet() -> None:
    """For a process of the bench: only errors of theirs are shown."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
