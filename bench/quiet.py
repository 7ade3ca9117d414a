"""Silences log messages of other libraries at import, which are about GPUs."""

from __future__ import annotations

import logging

_CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")


def quiet() -> None:
    """Shows only errors of these libraries in this process."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
