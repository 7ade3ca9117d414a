"""A model that all contestants run: how it is built, its inputs, and what of its output is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
# One run of one case; it returns what Subject.rows takes.
Call = Callable[[], Any]


def hidden(model: nn.Module, inputs: Inputs) -> Call:
    """An encoder's run: its last hidden states."""

    @torch.inference_mode()
    def call() -> object:
        return model(**inputs).last_hidden_state

    return call


def _none() -> Sequence[Inputs]:
    return ()


def _same(inputs: Inputs) -> Inputs:
    return inputs


@dataclass(frozen=True)
class Subject:
    """A model.

    build: the model of torch in fp32 and eval mode; always the same weights.
    empty: the same without its weights, for nybble.load; None: it is built for that as well.
    cases: name of each timed case -> makes its inputs, in the order of the model's arguments. The first is the example from
        which graphs are made.
    arguments: takes the inputs of a case; returns the arguments with which a caller would begin.
    ready: takes a model of torch and the inputs of a case; returns its call. What is not to be timed is done before.
    rows: takes an output and the inputs that gave it; returns the vectors (N, D) whose cosines are compared.
    classes: whether these vectors are scores of classes: then the share of equal best ones is measured too.
    held: inputs on which these cosines are measured; none: those of the cases. calibration: other inputs, for contestants
        that need them.
    fusion, axes: for onnxruntime; see demo.onnx_runtime.write.
    steps: how many steps a call of each case has, if not one; times are those of a step.
    """

    name: str
    build: Callable[[], nn.Module]
    cases: Mapping[str, Callable[[], Inputs]]
    rows: Callable[[Any, Inputs], Tensor]
    classes: bool = False
    held: Callable[[], Sequence[Inputs]] = _none
    calibration: Callable[[], Sequence[Inputs]] = _none
    fusion: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    ready: Callable[[nn.Module, Inputs], Call] = hidden
    arguments: Callable[[Inputs], Inputs] = _same
    empty: Callable[[], nn.Module] | None = None

    def example(self) -> Inputs:
        """The inputs of the first case."""
        return next(iter(self.cases.values()))()
