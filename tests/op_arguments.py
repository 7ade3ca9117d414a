"""The arguments of the op linear, for the tests that call it."""

from __future__ import annotations

from typing import Any

import torch

from nybble.nn import Linear


def arguments(layer: Linear, x: torch.Tensor, **changed: Any) -> tuple[Any, ...]:
    """The op's arguments for a layer, some of them replaced."""
    named = {
        "x": x,
        "packed": layer.packed,
        "bias": layer.bias,
        "scheme": str(layer.scheme),
        "layout": layer.layout,
        "out_features": layer.out_features,
        "in_features": layer.in_features,
    }
    return tuple({**named, **changed}.values())
