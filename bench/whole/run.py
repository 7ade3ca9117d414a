"""``--preset whole-models`` and ``--preset modules``: every model's cases with all contestants in turns, then what is measured apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ...demo import DemoUnavailable
from ...dispatch import targets
from ..results import Row
from ..setup import THREADS, Setup
from . import apart, lines, show
from .contestant import Contestant
from .files import prepared, room
from .goals import checks
from .models import Model
from .pipeline import pipeline
from .race import Entry, cosines, enter, times
from .subject import Subject
from .suites import SUITES, WHOLE

# What is measured without a race -> how.
_APART: dict[str, Callable[[Subject, Sequence[Contestant], Path, int], list[Row]]] = {
    lines.START: apart.start_up,
    lines.RESIDENT: apart.resident,
    lines.KEPT: pipeline,
}
# Only writes the files of all contestants, so that a later run with NYBBLE_BENCH_FILES can begin with timing.
PREPARE = "prepare"


def cells(preset: str = WHOLE) -> list[str]:
    """The names of what a preset measures, in order."""
    models = SUITES[preset].models.values()
    return [f"{model.subject.name} {quantity}" for model in models for quantity in _quantities(model)]


def _quantities(model: Model) -> list[str]:
    return [*model.subject.cases, *model.more]


def whole_models(setup: Setup, preset: str = WHOLE) -> Iterator[str]:
    """Times the models of a preset; yields the tables of the models, then that of the goals."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    rows = [row for row in setup.done if row["kind"] in (lines.KIND, "skip")]
    setup.put(rows)
    try:
        with room() as root:
            for model in SUITES[preset].models.values():
                for new in _measured(model, setup, root):
                    setup.put(new)
                    rows += new
    finally:
        torch.set_num_threads(before)
    found = [{"kind": "run", "preset": preset, "targets": list(targets.detect().targets)}, *rows]
    setup.put([checked.line() for checked in checks(found, SUITES[preset].goals)])
    yield from show.models(found, show.plain)
    yield show.goals(found, show.plain)


def _measured(model: Model, setup: Setup, root: Path) -> Iterator[list[Row]]:
    """The lines of a model, cell by cell."""
    subject, names = model.subject, _quantities(model)
    finished = {row["quantity"] for row in setup.done if row["kind"] == lines.KIND and row["model"] == subject.name}
    wanted = [name for name in names if name not in finished and setup.wants(f"{subject.name} {name}")]
    try:
        if setup.only and setup.wants(f"{subject.name} {PREPARE}"):
            for contestant in model.contestants:
                if contestant.why_not() is None:
                    prepared(root, subject, contestant, THREADS)
        yield from _raced(model, [name for name in wanted if name not in _APART], setup, root)
        for name in wanted:
            if name in _APART:
                yield _APART[name](subject, model.contestants, root, THREADS)
    except (DemoUnavailable, ImportError) as error:
        yield [{"kind": "skip", "contestant": subject.name, "reason": str(error)}]
    for name in names:
        setup.advance(f"{subject.name} {name}")


def _raced(model: Model, wanted: Sequence[str], setup: Setup, root: Path) -> Iterator[list[Row]]:
    if not wanted:
        return
    entries: list[Entry] = []
    for found in enter(model.subject, model.contestants, root, THREADS):
        if isinstance(found, Entry):
            entries.append(found)
        else:
            yield [found]
    for name in wanted:
        if name == lines.COSINE:
            yield cosines(model.subject, entries)
        else:
            yield times(model.subject, name, entries, setup.budget_s)
