"""What a figure is: something that is tried many times, and a count of what failed."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FUZZ = "fuzz"  # what the lines of fuzz/run.py have for the name of a figure

_SHOWN = 20  # messages of failures that are kept


@dataclass
class Tally:
    """What a run has found so far.

    Attributes:
        tried: how often something was tried.
        failed: how often it failed.
        failures: the first messages.
        facts: what else was counted, by name.
        on: how many things it was tried on, by name: such as kernels.
    """

    tried: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    on: dict[str, int] = field(default_factory=dict)

    def add(self, wrong: str | None, count: int = 1) -> None:
        """Count something that was tried; ``wrong``: why it failed, or None."""
        self.tried += count
        if wrong is not None:
            self.failed += 1
            if len(self.failures) < _SHOWN:
                self.failures.append(wrong)

    def count(self, fact: str, by: int = 1) -> None:
        """Count a fact."""
        self.facts[fact] = self.facts.get(fact, 0) + by

    def most(self, fact: str, value: float) -> None:
        """Keep the largest value of a fact."""
        self.facts[fact] = max(self.facts.get(fact, value), value)

    def merge(self, other: Tally) -> None:
        """Add what another run has found; facts are counts, or largest values where their name begins with "most"."""
        self.tried += other.tried
        self.failed += other.failed
        self.failures = (self.failures + other.failures)[:_SHOWN]
        for fact, value in other.facts.items():
            (self.most if fact.startswith("most") else self.count)(fact, value)
        self.on |= other.on


class Misuse(ValueError):
    """Something is asked for that cannot be run."""


@dataclass(frozen=True)
class Trial:
    """A run that is asked for: how many, from which seed, and with which data (a directory, where a figure takes one)."""

    count: int
    seed: int = 0
    data: Path | None = None

    def part(self, of: int) -> range:
        """Of things that there are only so many of, those that this run tries: ``count``, of seed 0 the first, of seed 1 the next.

        Raises:
            Misuse: there are none left.
        """
        begin = self.seed * self.count
        if not 0 <= begin < of:
            raise Misuse(f"seed={self.seed}: must be in [0, {-(-of // self.count)}): {self.count} a run of {of}")
        return range(begin, min(begin + self.count, of))


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    Attributes:
        name: unique in the table.
        what: what must hold, in a line.
        count: how many a whole run tries.
        unit: what is counted.
        run: does it.
        needs: packages besides nybble's own dependencies.
        takes: what ``--data`` is for; "": it takes none.
        finite: whether there are only ``count``, of which another seed tries the next ones; False: another seed draws others.
    """

    name: str
    what: str
    count: int
    unit: str
    run: Callable[[Trial], Tally]
    needs: tuple[str, ...] = ()
    takes: str = ""
    finite: bool = False


def outcome(figure: Figure, trial: Trial) -> dict[str, Any]:
    """Run a figure. What came of it, with machine, date and versions, for ``line`` or as JSON."""
    begin = time.perf_counter()
    tally = figure.run(trial)
    return {
        "figure": figure.name,
        "what": figure.what,
        "unit": figure.unit,
        "asked": trial.count,
        "of": figure.count,
        "seed": trial.seed,
        "tried": tally.tried,
        "failed": tally.failed,
        "failures": tally.failures,
        "facts": tally.facts,
        "on": tally.on,
        "seconds": round(time.perf_counter() - begin, 1),
        **circumstances(),
    }


def circumstances() -> dict[str, Any]:
    """Where and when something is run, and of which versions."""
    import torch

    from .. import __version__
    from ..dispatch import targets

    machine = targets.detect()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{machine.cpu}, {os.cpu_count()} cores",
        "targets": list(machine.targets),
        "versions": {"nybble": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def told(found: dict[str, Any]) -> str:
    """What a run has counted besides, and on how many things, each after a comma."""
    return "".join(f", {name} {value:,}" for name, value in (found["facts"] | found["on"]).items())


def line(found: dict[str, Any]) -> str:
    """What came of a run, in one line."""
    counts = f"{found['tried']:,} {found['unit']} tried, {found['failed']:,} failed{told(found)}"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    run = f"seed {found['seed']}, {found['seconds']:g} s, {found['machine']}, {found['date']}, {versions}"
    return f"{found['figure']}: {counts} ({run})"
