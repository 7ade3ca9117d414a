"""The training loop of recover: Adam, a cosine schedule, and early stopping on held-out batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .shadow import Shadow

# Relative learning rates that the search tries, each on _TRIAL batches. For runs of _LONG steps or more, a larger rate is
# better than short trials suggest: the largest one with at least _LEAST_GAIN of the best gain is taken.
RATES = (5e-4, 1.5e-3, 4e-3)
_TRIAL, _LONG, _LEAST_GAIN = 20, 200, 1 / 8
_LAST = 1 / 20  # the final learning rate, relative to the first
_PATIENCE = 2  # epochs without progress before training stops

Loss = Callable[[int], Tensor]


@dataclass(frozen=True)
class Task:
    """The stand-ins to train, the loss of each batch, and the indices of training and held-out batches."""

    shadows: Sequence[Shadow]
    loss: Loss
    train_on: Sequence[int]
    held_out_on: Sequence[int]

    def held_out(self) -> float:
        """The mean loss over the held-out batches."""
        with torch.no_grad():
            return math.fsum(float(self.loss(b)) for b in self.held_out_on) / len(self.held_out_on)


@dataclass(frozen=True)
class Fit:
    """The result of a training: held-out loss at the start and at its best, steps, learning rate, and how it ended."""

    before: float
    after: float
    steps: int
    rate: float
    ended: str


def train(task: Task, rate: float, epochs: int, seed: int) -> Fit:
    """Train the stand-ins; they end with the values of the lowest held-out loss, which may be the initial ones.

    Stops early if a loss or gradient is not finite, or after two epochs without progress.
    """
    groups = [group for shadow in task.shadows for group in shadow.rates(rate)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    total = epochs * len(task.train_on)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _LAST + (1 - _LAST) * (1 + math.cos(math.pi * min(step, total) / total)) / 2
    )
    generator = torch.Generator().manual_seed(seed)
    before = best = task.held_out()
    kept, steps, waited, ended = state_of(task), 0, 0, "whole schedule"
    for _ in range(epochs):
        if not _epoch(task, optimizer, cosine, torch.randperm(len(task.train_on), generator=generator).tolist()):
            ended = "loss not finite"
            break
        steps += len(task.train_on)
        now = task.held_out()
        if now < best:
            best, kept, waited = now, state_of(task), 0
        else:
            waited += 1
            if waited == _PATIENCE:
                ended = "no progress"
                break
    restore(task, kept)
    return Fit(before, best, steps, rate, ended)


def search(task: Task, seed: int, steps: int) -> float:
    """The best learning rate for a run of ``steps`` steps, by a short trial of each; the stand-ins are restored.

    The rate with the largest gain or, for a long run, the largest rate with at least an eighth of that gain.
    """
    short = Task(task.shadows, task.loss, task.train_on[:_TRIAL], task.held_out_on)
    start, gains = state_of(task), {}
    for rate in RATES:
        fit = train(short, rate, 1, seed)
        gains[rate] = fit.before - fit.after
        restore(task, start)
    most = max(gains.values())
    fits = [rate for rate, gain in gains.items() if gain > 0 and gain >= (_LEAST_GAIN if steps >= _LONG else 1) * most]
    return max(fits, default=RATES[0])


def _epoch(
    task: Task, optimizer: torch.optim.Optimizer, cosine: torch.optim.lr_scheduler.LambdaLR, order: Sequence[int]
) -> bool:
    """One pass over the batches; False where a loss or a gradient is not finite."""
    parameters = [parameter for shadow in task.shadows for parameter in shadow.parameters()]
    for i in order:
        with torch.enable_grad():
            loss = task.loss(task.train_on[i])
            # Only for these: other parameters belong to the user and get no gradient.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        # The sum of a tensor is not finite if any element is not, and needs one read.
        sums = torch.stack([loss.detach().float(), *(g.sum() for g in gradients if g is not None)])
        if not bool(torch.isfinite(sums).all()):
            return False
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        cosine.step()
    return True


def state_of(task: Task) -> list[Tensor]:
    """A copy of the stand-ins' parameters."""
    return [parameter.detach().clone() for shadow in task.shadows for parameter in shadow.parameters()]


@torch.no_grad()
def restore(task: Task, state: list[Tensor]) -> None:
    """Restore the parameters that ``state_of`` returned."""
    parameters = [parameter for shadow in task.shadows for parameter in shadow.parameters()]
    for parameter, held in zip(parameters, state, strict=True):
        parameter.copy_(held)
