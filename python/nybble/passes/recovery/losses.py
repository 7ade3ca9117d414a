"""Distillation losses between the output of a model or block and that of the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...evaluate.outputs import main_output

LOSSES = ("auto", "kl", "mse")


def kind_of(asked: str, output: Any) -> str:
    """The kind of loss, "kl" or "mse". "auto" is KL if the output has ``logits``, else the squared error."""
    if asked != "auto":
        return asked
    return "kl" if isinstance(getattr(output, "logits", None), Tensor) else "mse"


def whole_loss(kind: str, output: Any, reference: Any, mask: Tensor | None) -> Tensor:
    """KL(reference || model) in nats per token, or the relative squared error, of a model's output."""
    ours, theirs = main_output(output).float(), main_output(reference).detach().float()
    if kind == "mse":
        return relative(ours, theirs, mask)
    ours, theirs = torch.log_softmax(_real(ours, mask), -1), torch.log_softmax(_real(theirs, mask), -1)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


def relative(output: Tensor, reference: Tensor, mask: Tensor | None) -> Tensor:
    """|output - reference|^2 / |reference|^2, without padding tokens."""
    ours, theirs = _real(output.float(), mask), _real(reference.float(), mask)
    return (ours - theirs).square().sum() / theirs.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    return x[mask] if mask is not None and x.shape[:-1] == mask.shape else x
