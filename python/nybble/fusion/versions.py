"""Whether a tensor was written to since it was seen."""

from __future__ import annotations

from torch import Tensor


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to, or None if torch does not count it: it was made in inference mode, even where its
    `data` was replaced since and `is_inference()` says no."""
    if tensor.is_inference():
        return None
    try:
        return tensor._version
    except RuntimeError:
        return None
