"""`nybble.optimize`: run the passes of a recipe on a model, all of them or none."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from importlib import metadata
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ..model.batches import check_batches
from ..model.digest import data_sha256
from ..model.eligible import is_linear_like
from ..model.opened import names_around, opened
from ..model.options import TIMING_S, check_progress, check_seconds
from ..model.walk import sites
from ..nn.module import QuantizedModule
from ..parallel.calibration import sharing
from ..recipe.recipe import DENSE, PASSES, Recipe, Stage
from ..report.advice import Advice, advise
from ..report.report import Report
from ..text import Items, Part, Shown
from ..weights.scheme import Scheme
from ..weights.sparsity import Block, Pattern
from .build import check_model
from .model_copy import ModelCopy
from .quantize import quantize
from .rotate.rotate import Rotation, rotated

# Stands for the stage's own scheme (or pattern), which layers get that match no pattern of ``layers``.
STAGE_DEFAULT = ""
# Seconds that a call may measure when those of the stage are spent.
_LEAST_S = 1e-3
# The argument that holds that scheme or pattern.
DEFAULT_ARGUMENT = {"quantize": "scheme", "sparsify": "pattern"}


class StageReport(Protocol):
    """The report of a pass."""

    def to_json(self) -> str:
        """The report as strict JSON."""

    def parts(self) -> Sequence[Part]:
        """As Shown.parts."""


@dataclass(frozen=True)
class Optimized(Shown):
    """The report of each stage. ``notes``: how data and versions differ from those that the recipe was made with."""

    recipe: Recipe
    reports: tuple[StageReport, ...]
    notes: tuple[str, ...] = ()

    def parts(self) -> Sequence[Part]:
        """As Shown.parts: each stage, then the notes, and what all of them advise to do next."""
        found: list[Part] = []
        for i, (stage, report) in enumerate(zip(self.recipe.stages, self.reports, strict=True), 1):
            found += [Items(f"stage {i} of {len(self.reports)}: {stage.name}", ()), *report.parts()]
        lines = [text for part in found if isinstance(part, Advice) for _, text in part.items]
        last = advise(lines)
        stages = [part for part in found if not isinstance(part, Advice)]
        return [*stages, *([Items.dashed("notes:", self.notes)] if self.notes else []), *([last] if last else [])]

    def to_json(self) -> str:
        """The recipe, the notes and each stage's report as strict JSON."""
        reports = [json.loads(report.to_json()) for report in self.reports]
        whole = {
            "schema": "nybble.optimized/1",
            "recipe": self.recipe.to_dict(),
            "notes": self.notes,
            "reports": reports,
        }
        return json.dumps(whole, indent=2, allow_nan=False)


def optimize(
    model: nn.Module,
    recipe: Recipe,
    *,
    calibration: Iterable[Any] | None = None,
    progress: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Optimized:
    """Run the passes of a recipe on ``model``, in place.

    The passes change a copy of its modules that shares its tensors. When all have finished, their changes are applied
    to the model. Until then it can be used as before.

    Args:
        model: any module, as for ``quantize``.
        recipe: the passes and their arguments. If a stage gives schemes by layer, each scheme is one call of the pass,
            in the order in which the schemes are listed; these calls share the stage's ``timing_s``.
        calibration: calibration batches, as for ``sparsify``; every pass that needs data gets them. ``recover`` also
            gets the original model (rotated, if a stage rotated it) as its reference, and the recipe's seed.
        progress: for the bars of the passes, as in ``quantize``.
        resume: a directory in which the passes that can be resumed keep their results.

    Returns:
        An ``Optimized``: the report of each stage.

    Raises:
        TypeError, ValueError: an argument is wrong, a pattern of ``layers`` matches no layer, or a pass rejects its
            arguments. After any exception, ``KeyboardInterrupt`` included, the model is unchanged.
    """
    check_model(model)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe={type(recipe).__name__}: must be a nybble.Recipe, see nybble.Recipe.load")
    check_progress(progress)
    batches = check_batches(calibration, model)
    if batches is not None:
        sharing("calibration")
    copied = ModelCopy(model)
    reports: list[StageReport] = []
    reference = model
    for i, stage in enumerate(recipe.stages):
        given: dict[str, Any] = {
            "calibration": batches,
            "data": batches,
            "examples": batches,
            "reference": reference,
            "seed": recipe.seed,
            "progress": progress,
        }
        if resume is not None:
            given["resume"] = Path(resume) / f"stage-{i}"
        reports.append(_run(stage, copied.model, given))
        if isinstance(reports[-1], Rotation) and reports[-1].seed is not None:
            # recover compares hidden states, so the reference needs the same rotation.
            reference = rotated(reference, reports[-1].seed)
    copied.adopt()
    return Optimized(recipe, tuple(reports), tuple(_differences(recipe, batches)))


def _run(stage: Stage, model: nn.Module, given: Mapping[str, Any]) -> StageReport:
    run = PASSES[stage.name]
    takes = signature(run).parameters
    arguments = {**{key: value for key, value in given.items() if key in takes}, **stage.arguments}
    layers = arguments.pop("layers", None)
    if layers is None:
        report: StageReport = run(model, **arguments)
        return report
    with opened(model):
        groups = _groups(model, layers, STAGE_DEFAULT if DEFAULT_ARGUMENT[stage.name] in arguments else DENSE)
        if not groups:
            return replace(quantize(model, exclude="*", goal="memory"), scheme=DENSE, merged=True)
        resume = arguments.get("resume")
        done: dict[str, Report] = {}
        limit = left = check_seconds("timing_s", arguments.pop("timing_s", TIMING_S))
        for i, (scheme, names) in enumerate(groups.items()):
            own: dict[str, Any] = {} if resume is None else {"resume": resume / str(i)}
            chosen = {**own, **_scheme(scheme), "include": [escape(name) for name in names]}
            if scheme != STAGE_DEFAULT and not Scheme.parse(scheme).static:
                chosen["observer"] = None
            one: Report = run(model, **{**arguments, **chosen, "timing_s": max(left, _LEAST_S) / (len(groups) - i)})
            left -= one.timing_s
            done |= dict.fromkeys(names, one)
        return replace(_merged(done), timing_limit_s=limit)


def _groups(model: nn.Module, layers: Mapping[str, str], default: str) -> dict[str, list[str]]:
    """Scheme -> names of the layers that get it, in the order of the patterns; layers that stay dense are left out."""
    groups: dict[str, list[str]] = {scheme: [] for scheme in (*layers.values(), default)}
    unused = set(layers)
    found = sites(model)
    within = names_around(found)
    for site in found:
        if not is_linear_like(site.module):
            continue
        names = (*site.names, *within.get(site.module, ()))
        matching = [pattern for pattern in layers if any(fnmatchcase(name, pattern) for name in names)]
        unused -= set(matching)
        if not isinstance(site.module, QuantizedModule):
            groups[layers[matching[0]] if matching else default].append(site.name)
    if unused:
        raise ValueError(
            f"layers: {', '.join(map(repr, sorted(unused)))} match no Linear layer; patterns are globs on full module names"
        )
    return {scheme: names for scheme, names in groups.items() if names and scheme != DENSE}


def _scheme(name: str) -> dict[str, Any]:
    """The arguments with which a pass produces this scheme."""
    if name == STAGE_DEFAULT:
        return {}
    scheme = Scheme.parse(name)
    if scheme.sparsity is None:
        return {"scheme": scheme}
    assert not isinstance(scheme.sparsity, Block), "Stage refuses block schemes"  # noqa: S101
    return {"scheme": scheme.dense, "pattern": Pattern(scheme.sparsity, scheme.sparsity.zeros)}


def _merged(done: Mapping[str, Report]) -> Report:
    """One report of several calls on one model; each layer's row comes from the call that handled the layer."""
    reports = list({id(report): report for report in done.values()}.values())
    rows = {name: {row.name: row for row in report.layers}[name] for name, report in done.items()}
    layers = tuple(rows.get(row.name, row) for row in reports[-1].layers)
    schemes = ", ".join(dict.fromkeys(report.scheme for report in reports))
    spent = math.fsum(one.timing_s for one in reports)
    return replace(reports[-1], layers=layers, scheme=schemes, timing_s=spent, merged=True)


def _differences(recipe: Recipe, batches: list[Any] | None) -> list[str]:
    """How versions and calibration data differ from those that the recipe was made with."""
    found = []
    for name, version in recipe.versions.items():
        try:
            here = metadata.version(name)
        except metadata.PackageNotFoundError:
            here = "not installed"
        if here != version:
            found.append(f"the recipe was made with {name} {version}; here it is {here}")
    if recipe.data_sha256 is not None and (batches is None or data_sha256(batches) != recipe.data_sha256):
        found.append(
            "the recipe was made with other calibration data"
            if batches
            else "the recipe was made with calibration data, and this run has none"
        )
    return found
