"""One call of a pass, from its arguments to its report; after any exception the model is unchanged."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ... import __version__
from ...fusion.fuse import fuse
from ...model.allocator import return_freed
from ...model.batches import check_batches
from ...model.options import TIMING_S, Options, check_flag, check_progress
from ...model.stages import eval_mode
from ...model.walk import Edits, Site
from ...report.report import Report
from ..build import check_strict
from ..plan import Plan
from ..rows import make_report
from .store import open_store
from .work import Work


class Call(NamedTuple):
    """The arguments that all passes share.

    ``settings``: what the result depends on besides model, data and options; part of the key of ``resume``. ``fuse``:
    whether chains of the new layers are to run as compiled steps.
    """

    calibration: Iterable[Any] | None
    strict: bool
    untie: bool
    progress: bool | None
    resume: str | os.PathLike[str] | None
    settings: tuple[object, ...]
    fuse: bool = False


def run_pass(
    model: nn.Module, sites: list[Site], asked: Options, call: Call, start: Callable[[Plan, Edits], Work]
) -> Report:
    """Run a pass on the model in place and return its report; ``start`` makes the pass's Work from the plan.

    Raises TypeError or ValueError; after any exception the model is unchanged.
    """
    for name in ("strict", "untie"):
        check_flag(name, getattr(call, name))
    check_progress(call.progress)
    batches = check_batches(call.calibration, model)
    edits = Edits()
    try:
        # Leave the caller's inference mode: tensors made inside it can never be used by autograd.
        with torch.inference_mode(False), torch.no_grad():
            plan = Plan(sites, asked)
            if not call.untie:
                plan.exclude_tied()
            work = start(plan, edits)
            if batches is None and work.needs_data:
                raise ValueError(f"{work.needs_data}; {work.without_data!r} needs none")
            store = None
            if call.resume is not None:
                # How long speeds are measured does not change a stored result.
                lasting = asked._replace(timing_s=TIMING_S)
                settings = (*lasting, call.untie, *call.settings, __version__)
                store = open_store(call.resume, settings, [*model.state_dict().values(), *tree_leaves(batches)])
            with eval_mode(model) if batches is not None else contextlib.nullcontext():
                work.begin(model, batches)
                work.run(model, batches, store, call.progress)
            work.finish()
            if call.strict:
                check_strict(plan)
            report = make_report(plan, work.title, work.builder.timer.spent)
            if call.fuse:
                report = replace(report, fusion=fuse(model, None if batches is None else batches[:1]))
            return_freed()
            return report
    except BaseException:
        edits.undo()
        raise
