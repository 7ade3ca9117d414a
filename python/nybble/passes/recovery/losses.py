"""How far a model's, or a block's, output is from the reference's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...evaluate.outputs import main_output

LOSSES = ("auto", "kl", "mse")


def kind_of(asked: str, output: Any) -> str:
    """ "kl" or "mse": what was asked for, or what suits an output; KL where it names its logits."""
    if asked != "auto":
        return asked
    return "kl" if isinstance(getattr(output, "logits", None), Tensor) else "mse"


def whole_loss(kind: str, output: Any, reference: Any, mask: Tensor | None) -> Tensor:
    """KL(reference || model) in nats a token, or the relative squared error, of the outputs of a model."""
    ours, theirs = main_output(output).float(), main_output(reference).detach().float()
    if kind == "mse":
        return relative(ours, theirs, mask)
    ours, theirs = torch.log_softmax(_real(ours, mask), -1), torch.log_softmax(_real(theirs, mask), -1)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


def relative(output: Tensor, reference: Tensor, mask: Tensor | None) -> Tensor:
    """|output - reference|^2 / |reference|^2, without padding."""
    ours, theirs = _real(output.float(), mask), _real(reference.float(), mask)
    return (ours - theirs).square().sum() / theirs.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    return x[mask] if mask is not None and x.shape[:-1] == mask.shape else x
