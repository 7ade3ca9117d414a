"""Long runs that are killed, interrupted, or run out of disk or memory, at random moments, and are then resumed.

What was interrupted leaves the model as it was; what was resumed, in the same process or in a new one, has the bits of a run that
nobody disturbed.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..model.allocator import return_freed
from ..passes.choose import plan
from ..passes.quantize import quantize
from ..passes.recover import recover
from ..passes.sparsify import sparsify
from ..testing.models import Stack, give_scheme, token_batches
from .attempt import must, wrong_of
from .children import Child
from .faults import FAULTS, Fault
from .figure import Tally, Trial


@dataclass(frozen=True)
class Run:
    """A long run: what makes its model, and what runs on it with a directory to resume from; it returns what it tells."""

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, str], Any]


def _stack() -> nn.Module:
    torch.manual_seed(0)
    return Stack(2, 32).eval()


def _lossy() -> nn.Module:
    model = _stack()
    give_scheme(model, "w4a16g32")
    return model


def _gptq(model: nn.Module, resume: str) -> Any:
    return quantize(
        model, "w4a16g32", method="gptq", calibration=token_batches(2), goal="memory", resume=resume
    ).weight_bytes


def _sparsegpt(model: nn.Module, resume: str) -> Any:
    return sparsify(
        model, "50%", method="sparsegpt", calibration=token_batches(2), goal="memory", resume=resume
    ).weight_bytes


def _recover(model: nn.Module, resume: str) -> Any:
    done = recover(model, _stack(), token_batches(2), epochs=1, end_to_end_epochs=1, learning_rate=0.01, resume=resume)
    return done.to_json()


def _plan(model: nn.Module, resume: str) -> Any:
    found = plan(model, ("w8a8", "w4a16g32"), token_batches(2), budget={"bytes": "w8a8"})
    return json.dumps(found.recipe.to_dict(), sort_keys=True)


RUNS = {
    "gptq": Run(_stack, _gptq),
    "sparsegpt": Run(_stack, _sparsegpt),
    "recover": Run(_lossy, _recover),
    "plan": Run(_stack, _plan),
}


def bits_of(model: nn.Module) -> str:
    """A hash of the kinds of all modules, and of the names, dtypes, shapes and bits of all tensors."""
    found = hashlib.sha256()
    for name, module in model.named_modules():
        found.update(f"{name} {type(module).__name__} {module.training}\n".encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def attempt(name: str, resume: str, fault: str, share: float, say: Callable[[Any], None]) -> None:
    """In a child: run under a fault; if that interrupts it, check that the model is as it was, and resume. Says "ready", then
    "interrupted" where it was, and at last the bits of the model and what the run tells."""
    run, asked = RUNS[name], FAULTS[fault]
    if asked.warm:  # imports take memory too, and are not what is tried
        run.run(run.make(), tempfile.mkdtemp(dir=resume, prefix="warm-"))
    model = run.make()
    before, finished, told = bits_of(model), False, None
    return_freed()
    limits = asked.limits(Path(resume), share)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        say("ready")
        told = run.run(model, f"{resume}/kept")
        finished = True
    except asked.raises as error:
        if not finished:
            must(asked.is_meant(error), f"raised {type(error).__name__}: {error}")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        limits.lift()
    if not finished:
        must(bits_of(model) == before, "the model changed before the run was finished")
        say("interrupted")
        told = run.run(model, f"{resume}/kept")
    say((bits_of(model), told))


def _outcome(child: Child, fault: str, found: Tally) -> Any:
    """What a child says at last; None if it died."""
    while (said := child.heard()) == "interrupted":
        found.count(f"interrupted by {fault}")
    child.end()
    return said


def _undisturbed(name: str) -> tuple[Any, float]:
    """What a run gives, and the seconds that it takes."""
    with tempfile.TemporaryDirectory() as resume:
        child = Child(attempt, name, resume, "none", 0.0)
        must(child.heard() == "ready", "the run does not begin")
        begin = time.perf_counter()
        right = _outcome(child, "none", Tally())
        must(right is not None, "the run does not end")
        return right, time.perf_counter() - begin


def _moment(name: str, fault: Fault, share: float, right: Any, seconds: float, found: Tally) -> None:
    with tempfile.TemporaryDirectory() as resume:
        child = Child(attempt, name, resume, fault.name, share)
        must(child.heard() == "ready", "the run does not begin")
        if fault.signal is not None:
            time.sleep(share * seconds)
            child.signal(fault.signal)
        said = _outcome(child, fault.name, found)
        if said is None:
            found.count(f"died of {fault.name}")
            said = _outcome_of_new(name, resume, found)
        must(said == right, "resumed, it has other bits than undisturbed")


def _outcome_of_new(name: str, resume: str, found: Tally) -> Any:
    """What a new process gives, which resumes what another has left."""
    child = Child(attempt, name, resume, "none", 0.0)
    must(child.heard() == "ready", "the run does not begin again")
    return _outcome(child, "none", found)


def disturbed(trial: Trial) -> Tally:
    """``count`` moments for each run and each fault."""
    found = Tally()
    for name in RUNS:
        found.merge(disturb(name, [fault for fault in FAULTS if fault != "none"], trial))
    return found


def disturb(name: str, faults: Sequence[str], trial: Trial) -> Tally:
    """``count`` moments of one run for each of some faults."""
    found = Tally()
    right, seconds = _undisturbed(name)
    for fault in map(FAULTS.__getitem__, faults):
        draw = random.Random(f"{name} {fault.name} {trial.seed}")  # noqa: S311
        for number in range(trial.count):
            moment = draw.random()
            where = f"{name} {fault.name} {number} at {moment:.3f}"
            found.add(wrong_of(partial(_moment, name, fault, moment, right, seconds, found), where))
    return found
