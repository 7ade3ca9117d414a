"""Calibration batches: checks, and calls of a model with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def check_batches(calibration: Iterable[Any] | None, model: nn.Module) -> list[Any] | None:
    """The calibration batches as a list.

    Raises:
        TypeError: not an iterable of tensors, tuples and dicts, or the model cannot be called with a batch.
        ValueError: there are no batches, or one holds an empty tensor.
    """
    if calibration is None:
        return None
    if isinstance(calibration, (str, Tensor, Mapping)) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration={type(calibration).__name__}: must be an iterable of batches, each a tensor, a tuple or a dict"
        )
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration: has no batches")
    forward = inspect.signature(model.forward)
    for i, batch in enumerate(batches):
        if not isinstance(batch, (Tensor, tuple, list, Mapping)):
            raise TypeError(f"calibration[{i}]={type(batch).__name__}: must be a tensor, a tuple or a dict")
        args, kwargs = arguments(batch)
        try:
            forward.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"calibration[{i}]: does not fit {type(model).__name__}.forward{forward}: {error}"
            ) from None
        if any(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in tree_leaves((args, kwargs))):
            raise ValueError(f"calibration[{i}]: holds an empty tensor")
    return batches


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch."""
    args, kwargs = arguments(batch)
    return model(*args, **kwargs)


def model_calls(
    model: nn.Module, batches: Sequence[Any]
) -> tuple[tuple[Callable[[], Any], ...], tuple[Tensor | None, ...]]:
    """A call of the whole model for each batch, and each batch's attention mask (bool), or None."""
    return tuple(_caller(model, batch) for batch in batches), tuple(_mask(batch) for batch in batches)


def arguments(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The positional and keyword arguments that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), batch
    return ((batch,) if isinstance(batch, Tensor) else batch), {}


def _caller(model: nn.Module, batch: Any) -> Callable[[], Any]:
    return lambda: call(model, batch)


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
