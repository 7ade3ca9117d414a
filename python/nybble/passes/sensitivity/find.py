"""`nybble.sensitivity`: change one layer at a time and measure the change of the model's output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ... import _moved
from ...evaluate.data import ON_BAD, sift
from ...model.bar import bar
from ...model.batches import call
from ...model.opened import opened
from ...model.options import check_choice, check_progress
from ...model.stages import eval_mode
from ...parallel.calibration import sharing
from ...parallel.ranks import Ranks
from ...weights.scheme import Scheme
from ..build import check_model
from ..layerwise.shared import check_same
from .harm import MEASURES, Harm
from .outliers import Outliers, largest_inputs, outliers
from .result import Effect, LayerSensitivity, Sensitivity
from .shared import counts_of, largest_of
from .variants import Unit, check_schemes, placed, variants


@_moved.renamed_arguments
def sensitivity(
    model: nn.Module,
    schemes: str | Scheme | Sequence[str | Scheme],
    data: Iterable[Any],
    *,
    harm: str = "kl",
    quantize: Mapping[str, Any] | None = None,
    sparsify: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_bad: str = "error",
    progress: bool | None = None,
) -> Sensitivity:
    """Measure how much each scheme in one Linear layer alone changes the model's output.

    During the call the model is in eval mode and its layers are replaced one at a time, so no other thread should use
    it. Afterwards it is unchanged. Its outputs for all data are held in memory: 16 to 64 sequences are enough.

    Args:
        model: any module; its Linear layers must be inside it.
        schemes: such as ``("w8a8", "w4a16g128", "sp24w8a8")``.
        data: batches, as for ``evaluate``.
        harm: how it is measured. ``"kl"``: KL(original || changed) of the softmax of the output, in nats per token.
            ``"output"``: the squared change of the output relative to its square.
        quantize, sparsify: further arguments of the passes that make the layers, such as ``{"method": "mse"}`` or
            ``{"exclude": "*.head"}``. By default weights are rounded to nearest, and pruned by magnitude.
        seed: of the bootstrap intervals.
        on_bad: ``"error"`` or ``"skip"``, as for ``evaluate``.
        progress: True shows a bar on stderr, False none. None (default): a bar if stderr is a terminal and the work takes
            longer than two seconds. Bars need the package rich.

    Returns:
        A ``Sensitivity``: the layers, the largest harm first.

    Raises:
        TypeError, ValueError: an argument is wrong, no layer can have any of the schemes, or the model's output on the
            data is not finite.
    """
    check_model(model)
    asked = check_schemes("schemes", schemes)
    check_choice("harm", harm, tuple(MEASURES))
    check_choice("on_bad", on_bad, ON_BAD)
    check_progress(progress)
    batches = sift(data, model, on_bad)
    ranks = sharing("data")
    if ranks is not None:
        passes = [{k: v for k, v in (one or {}).items() if k != "calibration"} for one in (quantize, sparsify)]
        check_same(ranks, model, [*map(str, asked), *passes, harm, seed, on_bad])
    with opened(model), torch.no_grad():
        units = variants(model, asked, quantize or {}, sparsify or {})
        if not units:
            raise ValueError(f"schemes={schemes!r}: no layer of the model can have any of these schemes")
        with eval_mode(model):
            now = Harm(model, batches.kept, harm, seed, ranks)
            rows = measure(model, units, now, batches.kept, progress, ranks)
    return Sensitivity(tuple(rows), tuple(map(str, asked)), harm, counts_of(ranks, batches.skipped))


def measure(
    model: nn.Module,
    units: Sequence[Unit],
    harm: Harm,
    batches: Sequence[Any],
    progress: bool | None,
    ranks: Ranks | None = None,
) -> list[LayerSensitivity]:
    """A row for each unit, largest harm first; the model is in eval mode. ``ranks``: those that share batches, or None."""
    own = largest_inputs([unit.dense for unit in units], lambda: [call(model, batch) for batch in batches])
    inputs = largest_of(ranks, own)
    rows = []
    with bar(sum(len(unit.new) for unit in units), progress) as advance:
        for unit, largest in zip(units, inputs, strict=True):
            found = {}
            for scheme in unit.new:
                with placed([(unit, scheme)]):
                    found[scheme] = Effect(harm(), unit.reports[scheme].sqnr_db, unit.reports[scheme].nbytes_after)
                advance(f"{unit.name} {scheme}")
            shown = Outliers((), float("nan")) if largest is None else outliers(largest)
            shape = next(iter(unit.reports.values())).shape
            rows.append(LayerSensitivity(unit.name, shape, found, shown.channels, shown.peak, unit.left))
    return sorted(rows, key=lambda row: row.worst, reverse=True)
