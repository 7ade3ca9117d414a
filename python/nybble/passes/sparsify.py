"""`nybble.sparsify`: prune the Linear layers of a model and replace them by sparse ones."""

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
from ..weights.sparsity import Pattern, Unstructured
from .build import check_model
from .layerwise.run import Call, run_pass
from .prune.permuter import check_permute
from .prune.weight import METHODS
from .prune.work import Asked, Pruning, sparse_scheme


@returning_freed
def sparsify(
    model: nn.Module,
    pattern: str | Pattern,
    *,
    method: str = "wanda",
    calibration: Iterable[Any] | None = None,
    scheme: str | Scheme | None = "w8a8",
    observer: str | None = None,
    include: options.Patterns = None,
    exclude: options.Patterns = None,
    m: int | Sequence[int] = (1, 16, 256),
    goal: str = "speed",
    timing_s: float = options.TIMING_S,
    strict: bool = False,
    untie: bool = False,
    per_layer: bool = False,
    permute: bool | Sequence[Sequence[str]] = False,
    rollback: bool = True,
    progress: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Report:
    """Prune the Linear layers of ``model`` in place, replace them by sparse layers, and report on every layer.

    Layers are selected as in ``quantize``. With calibration data the model is pruned block by block (the blocks of its
    largest ``nn.ModuleList``, or else the whole model at once); each block sees the outputs of the pruned blocks before
    it, and the activations of one block are held in memory. During the call the model is in eval mode and its layers
    change, so no other thread should use it.

    A layer whose weight has the pattern already is packed unchanged.

    Args:
        model: any module; its Linear layers must be inside it, not the model itself.
        pattern: ``"50%"`` (unstructured: this share of the weights becomes zero), ``"2:4"`` or any n:m (n of m inputs
            are kept, m up to 128), ``"bs32x32:75%"`` (blocks of outputs x inputs), or a ``Pattern``. ``"auto"`` detects
            the pattern of each weight, packs it, and leaves layers without one unchanged.
        method: ``"magnitude"`` removes the smallest weights. ``"wanda"`` scores each weight by its magnitude times the
            norm of its input. ``"sparsegpt"`` chooses by the Hessian, updates the remaining weights to compensate, and
            rounds them in the same pass. A layer that does not allow a method falls back to the next simpler one; the
            report says why.
        calibration: calibration batches to call the model with, such as 128 short texts. Each is a tensor, a tuple
            (positional arguments) or a dict (keyword arguments). Tokens outside a batch's ``attention_mask`` are
            ignored. "magnitude" needs none.
        scheme: the format of the values in the sparse layers, such as ``"w8a8"`` or ``"w4a16g128"``. None keeps dense
            float layers: each gets a new, pruned weight Parameter.
        observer: for static schemes, how the range of each layer's inputs is found, as in ``quantize``.
        include, exclude: glob patterns on full module names, as in ``quantize``.
        m: the batch sizes (rows of the activation) at which speed is measured.
        goal: ``"speed"`` keeps a sparse layer only if it is measured to be faster than the dense one, ``"no_slower"``
            also one for which no difference is found, as in ``quantize``; otherwise the layer is not pruned at all.
            ``"memory"`` times nothing. Without a scheme nothing is timed.
        timing_s: the most seconds that all measurements of speed may take, as in ``quantize``.
        strict: raise if any Linear-like layer that ``include`` and ``exclude`` allow would stay as it is.
        untie: prune a copy of a weight that an ``nn.Embedding`` or another dense layer also uses.
        per_layer: choose the percentage of zeros of each layer by its output error, within 10 of the requested one. The
            mean over all weights is the requested percentage, to within 1 % of one layer. Unstructured patterns only.
        permute: for n:m patterns, permute the hidden channels of MLPs so that more magnitude is kept. This does not
            change the model's output; it is undone if the output on the first batch changes. True finds MLPs by common
            names. Or pass tuples of names: the layers that produce the channels, then the layer that consumes them,
            with only elementwise operations between.
        rollback: False frees each dense layer as soon as it is replaced, as in ``quantize``.
        progress: True shows a bar on stderr, False none. None (default): a bar if stderr is a terminal and the work takes
            longer than two seconds. Bars need the package rich.
        resume: a directory for finished layers. An interrupted run that is started again with the same model, data and
            settings reads them from there and gives bitwise the same result (``goal="speed"`` measures again).

    Returns:
        A ``Report``; each layer's ``pruned`` has its share of weights kept, and its relative output error.

    Raises:
        TypeError, ValueError: an argument is wrong, the method needs calibration data, or ``strict`` failed. After
            any exception, ``KeyboardInterrupt`` included, the model is unchanged, unless ``rollback=False``.
    """
    check_model(model)
    options.check_flag("per_layer", per_layer)
    chains = check_permute(permute)
    form = None if pattern == "auto" else Pattern.parse(pattern)
    if per_layer and not (form and isinstance(form.sparsity, Unstructured)):
        raise ValueError(f"per_layer=True, pattern={pattern!r}: needs an unstructured pattern such as '50%'")
    numbers = None if scheme is None else _check_scheme(scheme, form)
    options.check_flag("rollback", rollback)
    with opened(model, keep=rollback) as close:
        found = sites(model)
        asked = options.Options(
            scheme=numbers,
            include=None if include is None else options.check_patterns("include", include, found),
            exclude=options.check_patterns("exclude", exclude, found),
            method=options.check_choice("method", method, METHODS),
            m=options.check_m(m),
            goal="memory" if numbers is None else options.check_choice("goal", goal, options.GOALS),
            timing_s=options.check_seconds("timing_s", timing_s),
            observer=options.check_observer(observer, *([] if numbers is None else [numbers])),
            prunes=True,
        )
        wanted = Asked(form, per_layer, chains)
        call = Call(calibration, strict, untie, progress, resume, wanted, rollback=rollback, close=close)
        return run_pass(model, found, asked, call, lambda plan, edits: Pruning(plan, edits, wanted))


def _check_scheme(scheme: str | Scheme, pattern: Pattern | None) -> Scheme:
    """The dense scheme of the values, checked to combine with the pattern. Raises TypeError or ValueError."""
    numbers = Scheme.parse(scheme)
    if numbers.sparsity is not None:
        raise ValueError(
            f"scheme={str(numbers)!r}: must be dense, since pattern gives the sparsity; use {str(numbers.dense)!r}"
        )
    if pattern is not None:
        sparse_scheme(numbers, pattern)
    return numbers
