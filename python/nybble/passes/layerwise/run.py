"""One call of a pass, from its arguments to its report.

After any exception the model is unchanged or, without rollback, has the layers that were finished before it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ... import __version__
from ...fusion.fuse import fuse
from ...model.batches import check_batches
from ...model.options import TIMING_S, Options, check_flag, check_progress
from ...model.stages import eval_mode
from ...model.walk import Edits, Site
from ...parallel.calibration import sharing
from ...parallel.ranks import Ranks
from ...report.report import Report
from ..build import check_strict
from ..plan import Plan
from ..rows import make_report
from .shared import check_same
from .store import open_store
from .work import Work


class Call(NamedTuple):
    """The arguments that all passes share.

    ``settings``: what the result depends on besides model, data and options; part of the key of ``resume``. ``fuse``:
    whether chains of the new layers are to run as compiled steps. ``rollback``: whether dense layers are kept until the
    end, to be put back after an exception. ``close``: closes what was opened and has not changed, see ``model.opened``.
    """

    calibration: Iterable[Any] | None
    strict: bool
    untie: bool
    progress: bool | None
    resume: str | os.PathLike[str] | None
    settings: tuple[object, ...]
    fuse: bool = False
    rollback: bool = True
    close: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Raise TypeError or ValueError unless the flags are bools that go together."""
        for name in ("strict", "untie", "rollback"):
            check_flag(name, getattr(self, name))
        check_progress(self.progress)
        if self.strict and not self.rollback:
            raise ValueError(
                "strict=True, rollback=False: whether any layer stays dense is known when the others are replaced and "
                "could not be put back; leave out one of the two"
            )


def run_pass(
    model: nn.Module, sites: list[Site], asked: Options, call: Call, start: Callable[[Plan, Edits], Work]
) -> Report:
    """Run a pass on the model in place and return its report; ``start`` makes the pass's Work from the plan.

    Raises TypeError or ValueError. After any exception ``call.rollback`` says what the model is.
    """
    call.check()
    batches = check_batches(call.calibration, model)
    ranks = None if batches is None else sharing("calibration")
    edits = Edits(undoable=call.rollback)
    # Leave the caller's inference mode: tensors made inside it can never be used by autograd.
    with torch.inference_mode(False), torch.no_grad():
        plan = Plan(sites, asked)
        if not call.untie:
            plan.exclude_tied()
        try:
            work = start(plan, edits)
            if ranks is not None:
                _check_shared(ranks, model, work, call)
                work.ranks = ranks
            return _run(model, work, batches, call)
        except BaseException as error:
            edits.undo()
            if not call.rollback:
                plan.restore_training()
                _tell_what_stays(error, plan)
            raise


def _run(model: nn.Module, work: Work, batches: list[Any] | None, call: Call) -> Report:
    plan = work.plan
    if batches is None and work.needs_data:
        raise ValueError(f"{work.needs_data}; {work.without_data!r} needs none")
    store = None
    if call.resume is not None:
        # How long speeds are measured does not change a stored result.
        lasting = plan.options._replace(timing_s=TIMING_S)
        settings = (*lasting, call.untie, *call.settings, __version__)
        store = open_store(call.resume, settings, [*model.state_dict().values(), *tree_leaves(batches)])
    with eval_mode(model) if batches is not None else contextlib.nullcontext():
        work.begin(model, batches)
        work.run(model, batches, store, call.progress)
    plan.restore_training()
    if call.strict:
        check_strict(plan)
    report = make_report(plan, work.title, work.builder.timer.spent)
    call.close()
    if call.fuse:
        report = replace(report, fusion=fuse(model, None if batches is None else batches[:1]))
    return report


def _check_shared(ranks: Ranks, model: nn.Module, work: Work, call: Call) -> None:
    """Raise ValueError unless ranks that share their batches are sure to get the same layers."""
    asked = work.asked
    measured = asked.schemes and asked.goal != "memory"
    refused = {
        f"goal={asked.goal!r}": "ranks may measure different speeds; must be 'memory'" if measured else None,
        "fuse=True": "ranks may measure different speeds; call nybble.fuse afterwards" if call.fuse else None,
        f"resume={call.resume!r}": "results are not kept yet" if call.resume is not None else None,
    }
    for argument, why in refused.items():
        if why is not None:
            raise ValueError(f"{argument}: within share_batches, {why}")
    check_same(ranks, model, [*map(str, asked), call.untie, *map(str, call.settings)])


def _tell_what_stays(error: BaseException, plan: Plan) -> None:
    """Add to an exception which layers of the model have changed; with Python 3.10, which has no notes, as a warning."""
    done = sum(layer.is_done for layer in plan.layers)
    if not done:
        return
    text = (
        f"rollback=False: {done} of {len(plan.layers)} layers are finished and stay in the model; it can be used, and "
        "a new call goes on with the others"
    )
    if sys.version_info >= (3, 11):
        error.add_note(text)
    else:
        warnings.warn(text, stacklevel=4)
