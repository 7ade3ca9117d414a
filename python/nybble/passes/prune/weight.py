"""Prune one weight by the requested method, or fall back to a simpler one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...compiled.ranking import keep_only
from ...compiled.rounding import quantize_weight
from ...model.inputs import NO_DATA, Inputs
from ...weights.rounding import dequantize_weight
from ...weights.scheme import Scheme
from ...weights.sparsity import Pattern
from ..layerwise.errors import weight_loss
from ..layerwise.outcome import Outcome
from .masks import keep_mask, magnitude_scores, wanda_scores
from .sparsegpt import Solved, sparsegpt

# In the order in which they fall back.
METHODS: tuple[str, ...] = ("sparsegpt", "wanda", "magnitude")


class Task(NamedTuple):
    """How to prune a weight. ``scheme``: the dense scheme that it is rounded to, or None."""

    pattern: Pattern
    method: str
    scheme: Scheme | None


def prune_weight(weight: Tensor, task: Task, inputs: Inputs | None = None) -> Outcome:
    """Prune a finite weight (N, K), any float dtype.

    SparseGPT falls back to Wanda if the Hessian cannot be factored, its result is not finite, or Wanda is better on
    held-out data. Wanda falls back to magnitude if there is no data or the norms are not finite. The notes say so.
    """
    usable = inputs is not None and inputs.is_usable
    notes = [] if inputs is None else inputs.notes()
    if task.method == "magnitude" or inputs is None or not usable:
        if task.method != "magnitude":
            notes.append(f"magnitude instead of {task.method}: {NO_DATA}")
        return Outcome(_masked(weight, magnitude_scores(weight), task.pattern), "magnitude", tuple(notes))
    wanda = _masked(weight, wanda_scores(weight, inputs.norms), task.pattern)
    if task.method == "wanda":
        return Outcome(wanda, "wanda", tuple(notes))
    solved = _solve(weight, wanda, task, inputs, notes)
    if solved is None:
        return Outcome(wanda, "wanda", tuple(notes))
    return Outcome(solved.weight.to(weight.dtype), "sparsegpt", tuple(notes), solved.quantized)


def _masked(weight: Tensor, scores: Tensor, pattern: Pattern) -> Tensor:
    return keep_only(weight, keep_mask(scores, pattern))


def _solve(weight: Tensor, wanda: Tensor, task: Task, inputs: Inputs, notes: list[str]) -> Solved | None:
    """SparseGPT's result, or None, with a note, if it failed or Wanda is better on held-out data."""
    hessian = inputs.hessian
    solved = None if hessian is None else sparsegpt(weight, hessian, task.pattern, task.scheme, inputs.drift)
    if solved is None:
        notes.append("wanda instead of sparsegpt: the Hessian cannot be factored, or the result is not finite")
        return None
    if inputs.rows < weight.shape[1]:
        notes.append(f"only {inputs.rows} rows of calibration data for {weight.shape[1]} inputs; sparsegpt needs more")
    if solved.factor.note is not None:
        notes.append(solved.factor.note)
    simple = wanda
    if task.scheme is not None:
        simple = dequantize_weight(quantize_weight(wanda, task.scheme), task.scheme, weight.shape[1])
    ours, theirs = (weight_loss(weight, new, inputs.held_out) for new in (solved.weight, simple))
    if not torch.isfinite(solved.weight.to(weight.dtype)).all():
        notes.append(f"wanda instead of sparsegpt: the result exceeds the range of {weight.dtype}")
        return None
    if not ours <= theirs:
        notes.append(f"wanda instead of sparsegpt: its loss on held-out data is {ours / theirs:.3g} times Wanda's")
        return None
    return solved
