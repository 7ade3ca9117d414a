"""Swap the Linear layers of a model for quantized ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..model import options
from ..model.walk import sites
from ..report.report import Report
from ..weights.scheme import Scheme
from ..weights.search import check_hqq
from .build import check_model
from .layerwise.carry import Call, carry_out
from .round.ladder import METHODS
from .round.scales import Awq, Smooth
from .round.work import Rounding


def quantize(
    model: nn.Module,
    scheme: str | Scheme = "w8a8",
    *,
    include: options.Patterns = None,
    exclude: options.Patterns = None,
    method: str = "rtn",
    calibration: Iterable[Any] | None = None,
    smooth: bool | float = False,
    observer: str | None = None,
    m: int | Sequence[int] = (1, 16, 256),
    goal: str = "speed",
    strict: bool = False,
    untie: bool = False,
    progress: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Report:
    """Quantize the Linear layers of ``model`` in place and report on every layer.

    Swapped are modules that are exactly ``nn.Linear`` or transformers' ``Conv1D``, in float32, bfloat16 or float16 on
    the CPU. Everything else is left alone and the report says why. Nothing is excluded by name.

    Args:
        model: any module; its Linear layers must be inside it, not the model itself.
        scheme: what the weights and activations become, such as ``"w8a8"``, ``"w4a8g128"`` or a ``Scheme``. Static ones,
            such as ``"w8a8static"``, need calibration data.
        include: glob patterns on full module names; only layers that match one are quantized. None means all.
        exclude: glob patterns on full module names; layers that match one are left alone.
        method: how weights are rounded: ``"rtn"`` (to nearest), ``"mse"`` (search for the scale), or by what the layer's
            inputs are: ``"gptq"`` (what one code misses is made up for by the next), ``"awq"`` (scales that favour the
            weights of large inputs, and ranges by the loss at the output); or ``"hqq"`` (4-bit groups, no data: the scale and zero point of the least 0.7-norm error). Where a layer does
            not allow a method, or does worse by it on data held out, it gets a simpler one, and the report says so.
        calibration: batches to call the model with, each a tensor, a tuple (positional) or a dict (keywords), such as
            128 short texts, or a DataLoader. Tokens that a batch's ``attention_mask`` leaves out do not count. With it
            the model is quantized block by block as in ``sparsify``, each on the outputs of those that are done.
        smooth: SmoothQuant, for schemes with 8-bit activations: divide the inputs of layers by scales, and multiply their
            weights, where a norm or a layer before can take the division; exact but for rounding. True looks for the
            scales in a grid, a number between 0 and 1 is the share of the inputs' spread that moves to the weights;
            both only where inputs held out agree. Needs calibration data, and goes with every method but "awq".
        observer: for static schemes, such as ``"w8a8static"``, how the range of each layer's inputs is found: ``"minmax"``
            (the extremes), ``"percentile"`` (99.9 % of the values), ``"mse"`` (the least squared error of rounding; the
            default). A layer whose output error on inputs held out is then above 1 % and twice that with dynamic
            activations gets these, and the report says so.
        m: the batch sizes (rows of the activation) at which speed counts.
        goal: ``"speed"`` swaps a layer only where the geometric mean over ``m`` of dense time / nybble time, measured
            here with the threads set now, is above 1. ``"memory"`` swaps every layer and times nothing.
        strict: raise if any Linear-like layer that ``include`` and ``exclude`` allow would stay dense.
        untie: quantize a copy of a weight that an ``nn.Embedding`` or another dense layer also uses. By default such
            a layer is left alone. Quantized layers that share one weight stay tied either way.
        progress: True shows a bar on stderr, False none. None (default): a bar if stderr is a terminal and the work takes
            longer than two seconds. Bars need the package rich.
        resume: a directory for the layers that are done. A run that was cut off, started again with the same model,
            data and settings, takes them from there and ends with the same bits (``goal="speed"`` measures again).

    Returns:
        A ``Report``; each layer's ``rounded`` has its method and output errors. Layers keep their training flag; the
        bias stays the same parameter.

    Raises:
        TypeError, ValueError: an argument is wrong, the model is itself a Linear layer, the method needs calibration
            data, or ``strict`` failed. After any exception, ``KeyboardInterrupt`` included, the model is as it was.
    """
    check_model(model)
    numbers = Scheme.parse(scheme)
    found = sites(model)
    asked = options.Options(
        scheme=numbers,
        include=None if include is None else options.check_patterns("include", include, found),
        exclude=options.check_patterns("exclude", exclude, found),
        method=options.check_choice("method", method, METHODS),
        m=options.check_m(m),
        goal=options.check_choice("goal", goal, options.GOALS),
        observer=options.check_observer(observer, numbers),
    )
    scaling = _scaling(smooth, asked.method, numbers)
    call = Call(calibration, strict, untie, progress, resume, settings=(scaling,))
    return carry_out(model, found, asked, call, lambda plan, edits: Rounding(plan, edits, numbers, scaling))


def _scaling(smooth: bool | float, method: str, scheme: Scheme) -> Awq | Smooth | None:
    """The scales to look for. Raises TypeError or ValueError."""
    if method == "hqq":
        check_hqq(scheme)
    if not isinstance(smooth, (bool, float, int)):
        raise TypeError(f"smooth={smooth!r}: wants True, False, or a number between 0 and 1")
    if smooth is False:
        return Awq() if method == "awq" else None
    if smooth is not True and not 0 < smooth < 1:
        raise ValueError(f"smooth={smooth!r}: wants True, False, or a number between 0 and 1")
    if method == "awq" or scheme.act_bits != 8:
        raise ValueError(
            f"smooth={smooth!r}: not with method={method!r}, scheme={str(scheme)!r}; it is for 8-bit "
            "activations, and AWQ has scales of its own"
        )
    return Smooth() if smooth is True else Smooth((float(smooth),))
