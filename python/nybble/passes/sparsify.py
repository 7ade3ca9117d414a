"""Prune the Linear layers of a model, and swap them for sparse ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..model import options
from ..model.walk import sites
from ..report.report import Report
from ..weights.scheme import Scheme
from ..weights.sparsity import Pattern, Unstructured
from .build import check_model
from .layerwise.carry import Call, carry_out
from .prune.fold import check_permute
from .prune.weight import METHODS
from .prune.work import Asked, Pruning, sparse_scheme


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
    strict: bool = False,
    untie: bool = False,
    per_layer: bool = False,
    permute: bool | Sequence[Sequence[str]] = False,
    progress: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Report:
    """Prune the Linear layers of ``model`` in place, make them sparse layers, and report on every layer.

    Which layers, and what is left alone, is as in ``quantize``. With calibration data the model is pruned a block at a
    time (its largest ``nn.ModuleList``, or else the whole model), each on the outputs of those that are pruned already;
    one block's activations are held. Meanwhile the model is in eval mode and its layers change one after another: no
    other thread should use it.

    A layer whose weights are as sparse already as the pattern asks for is packed as it is.

    Args:
        model: any module; its Linear layers must be inside it, not the model itself.
        pattern: ``"50%"`` (of the weights become zero), ``"2:4"`` or any n:m (n of m inputs kept, m up to 128),
            ``"bs32x32:75%"`` (blocks of outputs x inputs), a ``Pattern``; or ``"auto"``: pack the patterns that the
            weights have, and leave layers alone that have none.
        method: ``"magnitude"`` removes the smallest weights; ``"wanda"`` the smallest times the norm of their input;
            ``"sparsegpt"`` chooses by the loss, has the other weights make up for it, and rounds them in the same go.
            Where a layer does not allow a method it gets the simpler one, and the report says so.
        calibration: batches to call the model with, each a tensor, a tuple (positional) or a dict (keywords), such as
            128 short texts. Tokens that a batch's ``attention_mask`` leaves out do not count. "magnitude" needs none.
        scheme: the numbers of the sparse layers, such as ``"w8a8"`` or ``"w4a16g128"``; or None: only the weights
            change, each a new Parameter of the dense layer.
        observer: for static schemes, how the range of each layer's inputs is found, as in ``quantize``.
        include, exclude: glob patterns on full module names, as in ``quantize``.
        m: the batch sizes (rows of the activation) at which speed counts.
        goal: ``"speed"`` keeps a sparse layer only where it is faster than the dense one, as in ``quantize``; where it
            is not, the layer is not pruned either. ``"memory"`` times nothing. Without a scheme nothing is timed.
        strict: raise if any Linear-like layer that ``include`` and ``exclude`` allow would be left alone.
        untie: prune a copy of a weight that an ``nn.Embedding`` or another dense layer also uses.
        per_layer: give each layer its own share of zeros, within 10 of the percent that the pattern asks for, by
            how much its output suffers; the mean over all weights is what was asked for, to 1 % of one layer. Unstructured only.
        permute: for n:m patterns, reorder what lies between the layers of an MLP so that more magnitude is kept; exact,
            and undone where the model's output on the first batch says otherwise. True finds MLPs by the usual names;
            or give tuples of names: the layers that make the values, then the one that takes them, with elementwise
            operations in between.
        progress: True shows a bar on stderr, False none. None (default): a bar if stderr is a terminal and the work takes
            longer than two seconds. Bars need the package rich.
        resume: a directory for the layers that are done. A run that was cut off, started again with the same model,
            data and settings, takes them from there and ends with the same bits (``goal="speed"`` measures again).

    Returns:
        A ``Report``; each layer's ``pruned`` has its share of weights kept, and its relative output error.

    Raises:
        TypeError, ValueError: an argument is wrong, the method needs calibration data, or ``strict`` failed. After
            any exception, ``KeyboardInterrupt`` included, the model is as it was.
    """
    check_model(model)
    options.check_flag("per_layer", per_layer)
    chains = check_permute(permute)
    form = None if pattern == "auto" else Pattern.parse(pattern)
    if per_layer and not (form and isinstance(form.sparsity, Unstructured)):
        raise ValueError(f"per_layer=True, pattern={pattern!r}: wants an unstructured pattern such as '50%'")
    numbers = None if scheme is None else _check_scheme(scheme, form)
    found = sites(model)
    asked = options.Options(
        scheme=numbers,
        include=None if include is None else options.check_patterns("include", include, found),
        exclude=options.check_patterns("exclude", exclude, found),
        method=options.check_choice("method", method, METHODS),
        m=options.check_m(m),
        goal="memory" if numbers is None else options.check_choice("goal", goal, options.GOALS),
        observer=options.check_observer(observer, numbers),
    )
    wanted = Asked(form, per_layer, chains)
    call = Call(calibration, strict, untie, progress, resume, settings=wanted)
    return carry_out(model, found, asked, call, lambda plan, edits: Pruning(plan, edits, wanted))


def _check_scheme(scheme: str | Scheme, pattern: Pattern | None) -> Scheme:
    """The dense scheme of the numbers, if it can be sparse. Raises TypeError or ValueError."""
    numbers = Scheme.parse(scheme)
    if numbers.sparsity is not None:
        raise ValueError(f"scheme={str(numbers)!r}: names a sparsity; use {str(numbers.dense)!r}, the pattern says it")
    if pattern is not None:
        sparse_scheme(numbers, pattern)
    return numbers
