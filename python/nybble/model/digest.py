"""A hash of calibration data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def data_sha256(batches: Iterable[Any]) -> str:
    """SHA-256 of calibration batches: of each tensor's shape, dtype and bytes, and of the repr of all other values."""
    content = hashlib.sha256()
    for leaf in tree_leaves(list(batches)):
        if isinstance(leaf, Tensor):
            content.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
            content.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            content.update(repr(leaf).encode())
    return content.hexdigest()
