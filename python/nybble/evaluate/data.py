"""Evaluation data: checks of the batches, prediction targets and token masks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..model.batches import arguments

ON_BAD = ("error", "skip")


@dataclass
class Batches:
    """The usable batches. ``skipped``: reason -> how many batches were skipped for it."""

    kept: list[Any] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        """Count a skipped batch."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def sift(data: Iterable[Any], model: nn.Module, on_bad: str) -> Batches:
    """The usable batches of ``data``; each must fit the model and have the form of the first.

    Raises:
        TypeError: ``data`` is not an iterable of batches.
        ValueError: no batch is usable, or ``on_bad`` is "error" and one is not.
    """
    if isinstance(data, (str, Tensor, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(f"data={type(data).__name__}: must be an iterable of batches, each a tensor, a tuple or a dict")
    found = Batches()
    count = 0
    for i, batch in enumerate(data):
        count += 1
        reason = why_bad(batch, model, found.kept[0] if found.kept else None)
        if reason is None:
            found.kept.append(batch)
        elif on_bad == "error":
            raise ValueError(f"data[{i}]: {reason} (on_bad='skip' skips such batches)")
        else:
            found.skip(reason)
    if not found.kept:
        why = ", ".join(f"{n} x {reason}" for reason, n in found.skipped.items()) or "it is empty"
        raise ValueError(f"data: none of its {count} batches is usable: {why}")
    return found


def why_bad(batch: Any, model: nn.Module, first: Any) -> str | None:
    """Why a batch is not usable with the model, or None."""
    if not isinstance(batch, (Tensor, tuple, list, Mapping)):
        return f"is {type(batch).__name__}, must be a tensor, a tuple or a dict"
    if first is not None and _form(batch) != _form(first):
        return f"has {_form(batch)}, but the first batch has {_form(first)}"
    args, kwargs = arguments(batch)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        return f"does not fit {type(model).__name__}.forward: {error}"
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not tensors or any(tensor.numel() == 0 for tensor in tensors):
        return "is empty"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point()):
        return "has NaN or Inf"
    return None


def _form(batch: Any) -> str:
    """The form of a batch, which must be the same for all batches."""
    if isinstance(batch, Mapping):
        return f"the keys {', '.join(sorted(map(str, batch)))}"
    return "one tensor" if isinstance(batch, Tensor) else f"{len(batch)} values"


def sequences(batch: Any) -> int:
    """The number of sequences (or rows) in a batch."""
    return next(leaf.shape[0] if leaf.dim() else 1 for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


def targets(batch: Any) -> Tensor | None:
    """The next tokens that logits (B, T, V) predict, int64 (B, T - 1), -100 at padding; None if a batch has no tokens."""
    if isinstance(batch, Mapping):
        ids = batch.get("labels", batch.get("input_ids"))
        mask = batch.get("attention_mask")
    else:
        ids, mask = batch if isinstance(batch, Tensor) else batch[0], None
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
        return None
    ids = ids.long()
    return (ids if mask is None else ids.masked_fill(mask == 0, -100))[:, 1:]


def token_mask(batch: Any, shape: torch.Size) -> Tensor | None:
    """The mask of an output's (B, T, ...) tokens that are not padding, bool (B, T); None if there is no padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == shape[:2] else None
