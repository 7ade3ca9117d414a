"""`nybble.fuse`: run chains of layers as compiled steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from ..model import options
from ..model.batches import call, check_batches
from .block import unfuse
from .pays import Timings
from .report import FusionReport
from .search import Search, stop_search

GOALS = ("speed", "always")
ATTENTION = ("float", "int8")


def fuse(
    model: nn.Module,
    examples: Iterable[Any] | None = None,
    *,
    include: options.Patterns = None,
    exclude: options.Patterns = None,
    goal: str = "speed",
    skip_padding: bool = False,
    attention: str = "float",
) -> FusionReport:
    """Let modules of ``model`` run as chains of compiled steps: attention, norms, activations and residuals with the
    quantized layers around them, in one or two calls for a whole block of a transformer.

    The model is run on the examples and watched: which torch functions and modules compute which values. What a module
    returns is then explained by steps that nybble has compiled. That explanation is proved: it is run in torch beside
    the module's own forward, in float, on the example and on other inputs, and must agree within rounding; and its
    compiled form must agree with it. What cannot be proved stays as it is, and the report says why. No class of a model
    is known by its name.

    The module keeps its parts, its ``state_dict`` and its own forward. It runs fused only without gradients
    (``torch.no_grad`` or ``torch.inference_mode``), in eval mode, on the CPU, without autocast, torch.compile, tracers and
    torch modes; otherwise it runs as before. A call of another kind than those seen (another mask, a cache) is watched
    and proved when it first comes. While a module inside is replaced or has a hook, as by PEFT or by an observer, the
    module runs as before, and the report says so.

    Args:
        model: any module, best after ``nybble.quantize``: dense linear layers run in torch between the compiled steps.
        examples: inputs to call the model with, as calibration batches: tensors, tuples or dicts. One of usual size is
            enough; more than one token is needed. None: the first calls of the model, without gradients and in eval
            mode, are the examples.
        include: glob patterns on full names of modules; only those that match one are fused. None means all.
        exclude: glob patterns on full names of modules that are left alone.
        skip_padding: do not compute the tokens at the end of a sequence that the attention masks hide from all others;
            what a chain returns for them is 0, and for all others what it was within rounding. For models whose callers do
            not read the padding, as those that pool over the mask. Not kept by ``nybble.save``.
        goal: "speed" keeps a chain only if it is measured to be faster than the module's own forward; "always" keeps
            each that was proved.
        attention: "int8" multiplies codes of 8 bits in the attention of the chains, where that takes less time: see
            ``nybble::attention``. It is compared with attention in floats on the inputs of the proof, and the report says
            how far the results are apart; chains whose results change by more than a tenth attend in floats.

    Returns:
        A FusionReport: each chain with its steps and its speed, and why other modules were left. Its ``undo()`` gives
        the modules their own forward back.

    Raises:
        TypeError, ValueError: an argument is wrong. After any exception, ``KeyboardInterrupt`` included, the model is
            unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}: must be a torch.nn.Module")
    options.check_choice("goal", goal, GOALS)
    options.check_flag("skip_padding", skip_padding)
    options.check_choice("attention", attention, ATTENTION)
    batches = check_batches(examples, model)
    wanted = _filter(model, include, exclude)
    stop_search(model)
    unfuse(model)
    search = Search(model, wanted, Timings() if goal == "speed" else None, skip_padding, attention == "int8")
    if batches is None:
        search.arm()
        return FusionReport(search)
    with _evaluating(model), torch.inference_mode(False), torch.no_grad():
        search.run([partial(call, model, batch) for batch in batches])
    return FusionReport(search)


@dataclass(frozen=True)
class _Wanted:
    """Whether a module may be fused, by its name."""

    include: tuple[str, ...] | None
    exclude: tuple[str, ...]

    def __call__(self, name: str) -> bool:
        included = self.include is None or any(fnmatchcase(name, one) for one in self.include)
        return included and not any(fnmatchcase(name, one) for one in self.exclude)


def _filter(model: nn.Module, include: options.Patterns, exclude: options.Patterns) -> _Wanted:
    """Raises TypeError or ValueError for a pattern that is no string or matches nothing."""
    names = [name for name, _ in model.named_modules()]
    given = {"include": include, "exclude": exclude}
    patterns = {key: (one,) if isinstance(one, str) else tuple(one or ()) for key, one in given.items()}
    for key, several in patterns.items():
        for pattern in several:
            if not isinstance(pattern, str):
                raise TypeError(f"{key}={given[key]!r}: {pattern!r} must be a string")
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{key}={given[key]!r}: {pattern!r} matches no module of the model")
    return _Wanted(None if include is None else patterns["include"], patterns["exclude"])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; the flags are restored afterwards."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
