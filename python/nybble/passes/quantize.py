"""`nybble.quantize`: replace the Linear layers of a model by quantized ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..model import options
from ..model.allocator import returning_freed
from ..model.opened import opened
from ..model.walk import sites
from ..report.report import Report
from ..weights.scheme import Scheme
from ..weights.search import check_hqq
from .build import check_model
from .layerwise.run import Call, run_pass
from .round.methods import METHODS
from .round.scales import Awq, Smooth
from .round.work import Rounding


@returning_freed
def quantize(
    model: nn.Module,
    scheme: str | Scheme | Sequence[str | Scheme] = "w8a8",
    *,
    include: options.Patterns = None,
    exclude: options.Patterns = None,
    method: str = "rtn",
    calibration: Iterable[Any] | None = None,
    smooth: bool | float = False,
    observer: str | None = None,
    m: int | Sequence[int] = (1, 16, 256),
    goal: str = "speed",
    timing_s: float = options.TIMING_S,
    max_error: float | None = None,
    strict: bool = False,
    untie: bool = False,
    fuse: bool | None = None,
    rollback: bool = True,
    progress: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Report:
    """Quantize the Linear layers of ``model`` in place and report on every layer.

    Replaces modules that are exactly ``nn.Linear`` or transformers' ``Conv1D``, in float32, bfloat16 or float16 on the
    CPU. All others stay as they are, and the report says why. No layer is excluded by its name.
    Tables of embeddings get the weights of the scheme without activations, rounded to nearest, unless they are slower
    than dense; ``exclude="*embed*"`` leaves such names alone. A head that shares the weight of an embedding shares its
    codes as well, and stays dense if the embedding does.

    Args:
        model: any module; its Linear layers must be inside it, not the model itself.
        scheme: the format of weights and activations, such as ``"w8a8"``, ``"w4a8g128"`` or a ``Scheme``. Static
            schemes, such as ``"w8a8static"``, need calibration data. Of several, such as ``("w8a8", "w8a7")``, each layer
            gets the fastest whose output error is at most ``max_error``: from the most exact one on, a less exact one is
            taken only if it is measured to be at least 3 % faster (with ``goal="memory"``: if it is smaller). The
            report's ``tried`` has their errors and speeds. Input scales of ``smooth`` and "awq" are those of the first scheme.
        include: glob patterns on full module names; only layers that match one are quantized. None means all.
        exclude: glob patterns on full module names; layers that match one are left alone.
        method: how weights are rounded. Without data: ``"rtn"`` (round to nearest), ``"mse"`` (the scale with the least
            squared error), ``"hqq"`` (4-bit groups: the scale and zero point with the least 0.7-norm error). With
            calibration data: ``"gptq"`` (later weights compensate the rounding error of earlier ones), ``"awq"``
            (input scales that protect the weights of large inputs, and clipping by output error). A layer that does not
            allow the method, or is worse with it than with ``"rtn"`` on held-out data, falls back to a simpler one; the
            report says why.
        calibration: calibration batches to call the model with, such as 128 short texts or a DataLoader. Each is a
            tensor, a tuple (positional arguments) or a dict (keyword arguments). Tokens outside a batch's
            ``attention_mask`` are ignored. The model is then quantized block by block, as in ``sparsify``: each block
            sees the outputs of the quantized blocks before it.
        smooth: SmoothQuant, for schemes with 8-bit activations: divide the inputs of layers by per-channel scales and
            multiply their weights by them, where a preceding norm or layer can absorb the division. True searches alpha
            in a grid; a number in (0, 1) is alpha. A scale is used only if it helps on held-out data. Needs calibration
            data; not with method "awq".
        observer: for static schemes, such as ``"w8a8static"``, how the range of each layer's inputs is found:
            ``"minmax"`` (the extremes), ``"percentile"`` (99.9 % of the values) or ``"mse"`` (the least squared rounding
            error; the default). A layer falls back to dynamic activations if its output error on held-out data is above
            1 % and above twice that of dynamic ones; the report says so.
        m: the batch sizes (rows of the activation) at which speed is measured.
        goal: ``"speed"`` replaces a layer only if it is measured to be faster on this machine with the current number of
            threads: the interval of the geometric mean over ``m`` of dense time / nybble time is above 1. ``"no_slower"``
            also replaces layers for which that interval holds 1, for the sake of memory. ``"memory"`` replaces every
            layer, untimed.
        timing_s: the seconds for all measurements of speed. Each kind of layer is timed once, in pairs of calls, until
            the interval excludes 1; one that stays undecided gets a twelfth of this time after its first pairs. No
            kind begins when the time is spent, and layers of the others stay dense; one that has begun gets a pair of
            calls for each ``m``, however long these take.
        max_error: the largest relative output error (Frobenius norm) that a layer may have, on held-out calibration
            data, or else on normal random rows. If no scheme is within it, the layer stays dense. None (default): 0.05
            for one of several schemes, no limit for a single one.
        strict: raise if any Linear-like layer that ``include`` and ``exclude`` allow would stay dense.
        untie: quantize a copy of a weight that a layer that stays dense also uses. By default such
            a layer stays dense. Quantized layers that share one weight stay tied either way.
        fuse: whether chains of layers then run as compiled steps where that is faster, as by ``nybble.fuse``: found with
            the first calibration batch, or without any in the first calls of the model. None (default): with
            ``goal="speed"``. What was found is the report's ``fusion``.
        rollback: True (default): after any exception the model is unchanged; for that all dense layers are kept until
            the end. False frees each as soon as it is replaced: the peak memory is that of the model and about its two
            largest layers. After an exception the layers that were finished stay as they are then; the model can be
            used, and a new call goes on with the others. Not with ``strict``.
        progress: True shows a bar on stderr, False none. None (default): a bar if stderr is a terminal and the work takes
            longer than two seconds. Bars need the package rich.
        resume: a directory for finished layers. An interrupted run that is started again with the same model, data and
            settings, ``timing_s`` aside, reads them from there and gives bitwise the same result (``goal="speed"``
            measures again; a scheme that is too slow now makes way for another, if there are several).

    Returns:
        A ``Report``; each layer's ``rounded`` has its method and output errors. Layers keep their training flag; the
        bias stays the same parameter.

    Raises:
        TypeError, ValueError: an argument is wrong, the model is itself a layer, the method needs calibration
            data, or ``strict`` failed. After any exception, ``KeyboardInterrupt`` included, the model is unchanged,
            unless ``rollback=False``: then a note of the exception says how many layers are finished.
    """
    check_model(model)
    schemes = options.check_schemes("scheme", scheme)
    options.check_flag("rollback", rollback)
    with opened(model, keep=rollback) as close:
        found = sites(model)
        asked = options.Options(
            scheme=schemes[0],
            include=None if include is None else options.check_patterns("include", include, found),
            exclude=options.check_patterns("exclude", exclude, found),
            method=options.check_choice("method", method, METHODS),
            m=options.check_m(m),
            goal=options.check_choice("goal", goal, options.GOALS),
            timing_s=options.check_seconds("timing_s", timing_s),
            observer=options.check_observer(observer, *schemes),
            others=schemes[1:],
            max_error=_most(max_error, len(schemes)),
        )
        scaling, *_ = [_scaling(smooth, asked.method, one) for one in schemes]
        if fuse is None:
            fuse = asked.goal == "speed"
        options.check_flag("fuse", fuse)
        call = Call(calibration, strict, untie, progress, resume, (scaling,), fuse, rollback, close)
        return run_pass(model, found, asked, call, lambda plan, edits: Rounding(plan, edits, scaling))


def _most(max_error: float | None, schemes: int) -> float | None:
    if max_error is None:
        return options.MAX_ERROR if schemes > 1 else None
    return options.check_share("max_error", max_error)


def _scaling(smooth: bool | float, method: str, scheme: Scheme) -> Awq | Smooth | None:
    """The method that finds input scales, or None. Raises TypeError or ValueError."""
    if method == "hqq":
        check_hqq(scheme)
    if not isinstance(smooth, (bool, float, int)):
        raise TypeError(f"smooth={smooth!r}: must be True, False, or a number between 0 and 1")
    if smooth is False:
        return Awq() if method == "awq" else None
    if smooth is not True and not 0 < smooth < 1:
        raise ValueError(f"smooth={smooth!r}: must be True, False, or a number between 0 and 1")
    if method == "awq" or not scheme.act_type.quantized:
        raise ValueError(
            f"smooth={smooth!r}, method={method!r}, scheme={str(scheme)!r}: needs a scheme with quantized activations and "
            "a method other than 'awq', which has scales of its own"
        )
    return Smooth() if smooth is True else Smooth((float(smooth),))
