"""`nybble.plan`: measure each scheme in each layer, choose under a budget, and measure the best choices as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ... import __version__, _moved
from ...evaluate.data import ON_BAD, sift
from ...model.digest import data_sha256
from ...model.opened import opened
from ...model.options import check_choice, check_m, check_progress
from ...model.stages import eval_mode
from ...parallel.calibration import check_alone
from ...weights.scheme import Scheme
from ..build import check_model
from ..sensitivity.find import measure
from ..sensitivity.harm import MEASURES, Harm
from ..sensitivity.result import LayerSensitivity, Sensitivity
from ..sensitivity.variants import Unit, check_schemes, placed, variants
from .budget import Budget
from .options import DENSE, Candidate, Menu, best, front
from .result import ChosenPlan, Point
from .times import Stopwatch

TRIED = 5  # choices that are measured end to end
_SHARES = (1.25, 1.0, 0.9, 0.8, 0.65, 0.5, 0.0)  # fractions of a harm limit for which a choice is measured


@_moved.renamed_arguments
def plan(
    model: nn.Module,
    candidates: str | Scheme | Sequence[str | Scheme],
    data: Iterable[Any],
    *,
    budget: Mapping[str, float | str],
    m: int = 1,
    save: str = "bytes",
    harm: str = "kl",
    quantize: Mapping[str, Any] | None = None,
    sparsify: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_bad: str = "error",
    progress: bool | None = None,
) -> ChosenPlan:
    """Choose a scheme for each Linear layer so that the model's output changes least within a budget.

    The harm of each candidate, the change of the model's output, is measured in each layer alone (see ``sensitivity``);
    so is its time, if needed. The solver minimizes the sum of harms. Sums only approximate the joint harm, so the five
    best choices are measured as a whole and the best of these is taken. The model is not changed:
    ``nybble.optimize(model, plan.recipe)`` applies the plan.

    Args:
        model, data, harm, quantize, sparsify, seed, on_bad, progress: as for ``sensitivity``.
        candidates: schemes such as ``("w8a8", "w4a16g128", "sp24w8a8")``. A layer may also stay dense.
        budget: one of ``{"bytes": n}``: total weight bytes of the layers that can have a candidate; ``{"ms": t}``: total
            time of one call of each of these layers with ``m`` rows, on this machine with the current number of threads;
            ``{"harm": d}``: measured harm of the whole plan. In place of a number, a scheme: the limit is then the cost
            of giving all layers that scheme.
        m: rows of the activation for ``"ms"``.
        save: what to minimize under a harm budget, ``"bytes"`` or ``"ms"``.

    Returns:
        A ``ChosenPlan`` with its recipe, and the Pareto front from the cheapest choice to the least harm.

    Raises:
        TypeError, ValueError: an argument is wrong, or no choice is within the budget; the message gives the smallest
            possible budget.
    """
    check_model(model)
    asked = Budget.parse(budget)
    schemes = check_schemes("candidates", candidates)
    if isinstance(asked.limit, Scheme) and asked.limit not in schemes:
        schemes = (*schemes, asked.limit)
    check_choice("harm", harm, tuple(MEASURES))
    check_choice("on_bad", on_bad, ON_BAD)
    check_choice("save", save, ("bytes", "ms"))
    check_progress(progress)
    (rows,) = check_m(m)
    batches = sift(data, model, on_bad)
    check_alone("data")
    with opened(model), torch.no_grad():
        units = variants(model, schemes, quantize or {}, sparsify or {})
        if not units:
            raise ValueError(f"candidates={candidates!r}: no layer of the model can have any of these schemes")
        with eval_mode(model):
            harm_now = Harm(model, batches.kept, harm, seed)
            alone = measure(model, units, harm_now, batches.kept, progress)
            watch = Stopwatch(rows) if "ms" in (asked.kind, save) else None
            menu = _menu(units, alone, watch)
            limit, choices = _choose(menu, asked, save, harm_now)
            found = [_point(menu, choice, harm_now) for choice in choices]
            uniform = {str(s): _point(menu, menu.uniform(str(s)), harm_now) for s in schemes if _is_there(menu, str(s))}
    chosen = _taken(found, asked.kind, limit, save)
    cost = save if asked.kind == "harm" else asked.kind
    return ChosenPlan(
        kind=asked.kind,
        limit=limit,
        m=rows,
        chosen=chosen,
        tried=tuple(found),
        uniform=uniform,
        front=tuple(_point(menu, choice) for choice in front(menu, cost)),
        sensitivity=Sensitivity(tuple(alone), tuple(map(str, schemes)), harm, batches.skipped),
        arguments={"quantize": _kept(quantize), "sparsify": _kept(sparsify)},
        data_sha256=data_sha256(batches.kept),
        versions={"nybble": __version__},
    )


def _menu(units: Sequence[Unit], alone: Sequence[LayerSensitivity], watch: Stopwatch | None) -> Menu:
    by_name = {layer.name: layer for layer in alone}
    return Menu(units, [_candidates(unit, by_name[unit.name], watch) for unit in units])


def _candidates(unit: Unit, alone: LayerSensitivity, watch: Stopwatch | None) -> list[Candidate]:
    """Dense, and each scheme with which the model's output is finite."""
    layers = {DENSE: unit.dense, **{scheme: new[0] for scheme, new in unit.new.items()}}
    # Layers that share a weight hold it once but each takes time.
    times = {} if watch is None else {k: len(unit.sites) * ms for k, ms in watch.times(layers, unit.dense).items()}
    row = next(iter(unit.reports.values()))
    found = [Candidate(DENSE, row.nbytes_before, times.get(DENSE), 0.0)]
    for scheme, effect in alone.effects.items():
        if abs(effect.harm.value) < float("inf"):
            # A harm below zero is noise; counting it would offset real harm of other layers.
            found.append(Candidate(scheme, effect.nbytes, times.get(scheme), max(0.0, effect.harm.value)))
    return found


def _choose(menu: Menu, asked: Budget, save: str, harm: Harm) -> tuple[float, list[tuple[int, ...]]]:
    """The limit as a number, and the choices to measure; if the limit is a scheme, the uniform choice is one of them."""
    own = [menu.uniform(str(asked.limit))] if isinstance(asked.limit, Scheme) else []
    if isinstance(asked.limit, float):
        limit = asked.limit
    else:
        limit = _measured(menu, own[0], harm).value if asked.kind == "harm" else menu.sum(own[0], asked.kind)
    if asked.kind != "harm":
        return limit, list(dict.fromkeys([*best(menu, asked.kind, limit, TRIED, save), *own]))
    # The joint harm may be above or below the sum, so choices on both sides of the limit are measured.
    choices = [best(menu, "harm", limit * share, 1, save)[0] for share in _SHARES]
    return limit, list(dict.fromkeys([*choices, *own]))


def _taken(found: Sequence[Point], kind: str, limit: float, save: str) -> Point:
    """The best measured point within the limit."""
    harms = {id(point): point.measured.value for point in found if point.measured is not None}
    if kind != "harm":
        return min(found, key=lambda point: harms[id(point)])
    within = [point for point in found if harms[id(point)] <= limit]
    return min(within, key=lambda point: point.nbytes if save == "bytes" else point.ms or 0.0)


def _measured(menu: Menu, choice: Sequence[int], harm: Harm) -> Any:
    with placed(menu.placed(choice)):
        return harm()


def _point(menu: Menu, choice: Sequence[int], harm: Harm | None = None) -> Point:
    timed = all(one.ms is not None for own in menu.candidates for one in own)
    point = Point(
        schemes=menu.schemes(choice),
        nbytes=int(menu.sum(choice, "bytes")),
        ms=menu.sum(choice, "ms") if timed else None,
        predicted=menu.sum(choice, "harm"),
    )
    return point if harm is None else replace(point, measured=_measured(menu, choice, harm))


def _is_there(menu: Menu, scheme: str) -> bool:
    return any(one.scheme == scheme for own in menu.candidates for one in own)


def _kept(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a pass that go into the recipe: no data, and no layer patterns, since it names each layer."""
    return {
        k: v
        for k, v in (arguments or {}).items()
        if k not in ("calibration", "include", "exclude", "progress", "resume")
    }
