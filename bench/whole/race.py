"""Loads all contestants of a model into one process, checks what each computes, and times them in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..contestants import WrongKernelError
from ..results import Row
from ..timing import NOISY_ABOVE, Runner, in_turns
from . import lines
from .contestant import Contestant, Ready
from .files import megabytes, prepared
from .subject import Inputs, Subject

# Shorter calls follow two that are not timed, as one sentence follows another: the contestants before have filled the caches.
_WAKE_BELOW_S = 20e-3


@dataclass(frozen=True)
class Entry:
    """A contestant that was loaded."""

    contestant: Contestant
    ready: Ready


def enter(subject: Subject, contestants: Sequence[Contestant], root: Path, threads: int) -> Iterator[Entry | Row]:
    """Each contestant, loaded, or the line that says why it takes no part; then the size of its files, if it has any."""
    for contestant in contestants:
        reason = contestant.why_not()
        try:
            if reason is None:
                folder = prepared(root, subject, contestant, threads)
                yield Entry(contestant, contestant.load(subject, folder))
        except (RuntimeError, ValueError, ImportError, ChildProcessError) as error:
            if not contestant.peer:
                raise
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        if reason is not None:
            yield {"kind": "skip", "contestant": contestant.name, "reason": f"{subject.name}: {reason}"}
        elif contestant.prepare is not None:
            yield _line(subject, lines.DISK, contestant, megabytes(folder))


def _line(subject: Subject, quantity: str, contestant: Contestant, value: float, **more: object) -> Row:
    return lines.line(subject.name, quantity, contestant.name, contestant.peer, value, **more)


def vectors(subject: Subject, entry: Entry, inputs: Inputs) -> Tensor:
    """The unit vectors of an output."""
    return torch.nn.functional.normalize(subject.rows(entry.ready(inputs)(), inputs), dim=-1)


def times(subject: Subject, case: str, entries: Sequence[Entry], budget_s: float) -> list[Row]:
    """The time of each contestant for a step of a case; a wrong peer gets the line that says so.

    Raises:
        WrongKernelError: nybble's output is wrong.
    """
    inputs = subject.cases[case]()
    right, rows = [], []
    reference = vectors(subject, entries[0], inputs)
    for entry in entries:
        complaint = _complaint(subject, entry, inputs, reference)
        if complaint is None:
            right.append(entry)
        elif entry.contestant.peer:
            rows.append({"kind": "skip", "contestant": entry.contestant.name, "reason": f"wrong: {complaint}"})
        else:
            raise WrongKernelError(f"{entry.contestant.name}: {complaint}; not timed")
    runners = [Runner([entry.ready(inputs)], entry.contestant.pool) for entry in right]
    timings, spread = in_turns(runners, budget_s, _WAKE_BELOW_S)
    steps = subject.steps.get(case, 1)
    for entry, timing in zip(right, timings, strict=True):
        rows.append(
            _line(
                subject,
                case,
                entry.contestant,
                timing.median / steps,
                p10=float(f"{timing.p10 / steps:.5g}"),
                p90=float(f"{timing.p90 / steps:.5g}"),
                rounds=timing.rounds,
                spread=round(spread, 4),
                noisy=spread > NOISY_ABOVE,
            )
        )
    return rows


def _complaint(subject: Subject, entry: Entry, inputs: Inputs, reference: Tensor) -> str | None:
    found = vectors(subject, entry, inputs)
    if found.shape != reference.shape:
        return f"{subject.name}: its output has the shape {tuple(found.shape)}, not {tuple(reference.shape)}"
    cosine = float((found * reference).sum(-1).mean())
    least = entry.contestant.least_cosine
    return None if cosine >= least else f"{subject.name}: cosine {cosine:.4f}, below {least:g}"


def cosines(subject: Subject, entries: Sequence[Entry]) -> list[Row]:
    """The mean and the worst cosine of each contestant's vectors to those of the first, on inputs that were held out; of
    scores of classes also how many of the best are the same."""
    held = subject.held() or [make() for make in subject.cases.values()]
    reference = [vectors(subject, entries[0], inputs) for inputs in held]
    rows = []
    for entry in entries:
        pairs = [(vectors(subject, entry, inputs), exact) for inputs, exact in zip(held, reference, strict=True)]
        found = torch.cat([(mine * exact).sum(-1) for mine, exact in pairs])
        values = {lines.COSINE: found.mean(), lines.WORST_COSINE: found.min()}
        if subject.classes:
            same = [mine.argmax(-1) == exact.argmax(-1) for mine, exact in pairs]
            values[lines.SAME_TOP_1] = torch.cat(same).float().mean()
        rows += [_line(subject, quantity, entry.contestant, float(value)) for quantity, value in values.items()]
    return rows
