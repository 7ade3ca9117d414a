"""Sums per sequence over a model's outputs: loss, KL divergence, cosine, output error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from .data import targets, token_mask

# The sum over each sequence and its weight (the divisor of the mean), float64 (B,) each.
Sums = tuple[Tensor, Tensor]


def main_output(output: Any) -> Tensor:
    """The output's ``logits`` if it has them, else its first float tensor. Raises TypeError if there is none."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    for leaf in tree_leaves(output if isinstance(output, (Tensor, tuple, list, dict)) else vars(output)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise TypeError(f"model: its output, {type(output).__name__}, holds no float tensor")


def loss_sums(output: Tensor, batch: Any) -> Sums:
    """Cross entropy, in nats, of logits (B, T, V) and the next tokens, summed over tokens, and their number.

    Raises:
        ValueError: the batch has no tokens, or the output is not logits.
    """
    wanted = targets(batch)
    if wanted is None or output.dim() != 3 or output.shape[:2] != (wanted.shape[0], wanted.shape[1] + 1):
        raise ValueError("metrics='perplexity': needs token ids (B, T) or a dict with input_ids, and logits (B, T, V)")
    logits = output[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=-100)
    return losses.view(wanted.shape).double().sum(1), (wanted != -100).double().sum(1)


def kl_sums(output: Tensor, reference: Tensor, batch: Any) -> Sums:
    """KL(reference || model) of the softmax over the last axis, in nats, summed over tokens, and their number."""
    log_p, log_q = (torch.log_softmax(logits.float(), -1) for logits in (reference, output))
    return _by_sequence((log_p.exp() * (log_p - log_q)).double().sum(-1), batch)


def cosine_sums(output: Tensor, reference: Tensor, batch: Any) -> Sums:
    """Cosine over the last axis, summed over tokens, and their number."""
    return _by_sequence(functional.cosine_similarity(output.double(), reference.double(), dim=-1), batch)


def output_error_sums(output: Tensor, reference: Tensor, batch: Any) -> Sums:
    """The squared change of the output, and the squared reference, each summed over tokens."""
    change, _ = _by_sequence((output.double() - reference.double()).square().sum(-1), batch)
    return change, _by_sequence(reference.double().square().sum(-1), batch)[0]


def _by_sequence(values: Tensor, batch: Any) -> Sums:
    """Sums over all axes but the first, without padding, and the number of values summed."""
    rows = values.reshape(values.shape[0], -1) if values.dim() else values.reshape(1, 1)
    mask = token_mask(batch, values.shape) if values.dim() == 2 else None
    kept = torch.ones_like(rows) if mask is None else mask.double()
    return torch.where(kept.bool(), rows, 0).sum(1), kept.sum(1)
