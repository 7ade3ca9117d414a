"""Train stand-ins: Adam, a cosine, held-out data that says when to stop and what to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .shadow import Shadow

# Relative steps that the search tries, and on how many batches. In a long run (of so many steps) one that is too large
# for a short one gets further, if it gets anywhere: so much of what the best gains.
RATES = (5e-4, 1.5e-3, 4e-3)
_TRIAL, _LONG, _LEAST_GAIN = 20, 200, 1 / 8
_LAST = 1 / 20  # of the rate, at the end
_PATIENCE = 2  # epochs

Loss = Callable[[int], Tensor]


@dataclass(frozen=True)
class Task:
    """Stand-ins, the loss of each batch, and which batches teach and which judge."""

    shadows: Sequence[Shadow]
    loss: Loss
    teach: Sequence[int]
    judge: Sequence[int]

    def held_out(self) -> float:
        """The mean loss of the batches that judge."""
        with torch.no_grad():
            return math.fsum(float(self.loss(b)) for b in self.judge) / len(self.judge)


@dataclass(frozen=True)
class Fit:
    """How a training went: held-out loss at its start and of what it kept; steps taken; the rate; how it ended."""

    before: float
    after: float
    steps: int
    rate: float
    ended: str


def train(task: Task, rate: float, epochs: int, seed: int) -> Fit:
    """Train the stand-ins; they end as they were when the held-out loss was lowest, at the start perhaps.

    A loss that is not finite ends it, as do two epochs without progress.
    """
    groups = [group for shadow in task.shadows for group in shadow.rates(rate)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    total = epochs * len(task.teach)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _LAST + (1 - _LAST) * (1 + math.cos(math.pi * min(step, total) / total)) / 2
    )
    generator = torch.Generator().manual_seed(seed)
    before = best = task.held_out()
    kept, steps, waited, ended = state_of(task), 0, 0, "whole schedule"
    for _ in range(epochs):
        if not _epoch(task, optimizer, cosine, torch.randperm(len(task.teach), generator=generator).tolist()):
            ended = "loss not finite"
            break
        steps += len(task.teach)
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
    """The rate for a run of so many steps, by a short run of each; the stand-ins are as they were afterwards.

    The one that gains most or, for a long run, the largest that gains an eighth of that.
    """
    short = Task(task.shadows, task.loss, task.teach[:_TRIAL], task.judge)
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
            loss = task.loss(task.teach[i])
            # Of these alone: what else the loss depends on is the user's.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        # One sum of each shows a value that is not finite, and reads it once.
        sums = torch.stack([loss.detach().float(), *(g.sum() for g in gradients if g is not None)])
        if not bool(torch.isfinite(sums).all()):
            return False
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        cosine.step()
    return True


def state_of(task: Task) -> list[Tensor]:
    """A copy of what the stand-ins have learned."""
    return [parameter.detach().clone() for shadow in task.shadows for parameter in shadow.parameters()]


@torch.no_grad()
def restore(task: Task, state: list[Tensor]) -> None:
    """Put back what ``state_of`` gave."""
    parameters = [parameter for shadow in task.shadows for parameter in shadow.parameters()]
    for parameter, held in zip(parameters, state, strict=True):
        parameter.copy_(held)
