"""Whether a chain is faster than the module's own forward: measured in pairs of calls, once for modules that are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..paired import Limits, Pairs, decide
from ..report.speed import Speed
from .arguments import Arguments, copied
from .forms import NotUnderstood
from .images import ImageProgram
from .lower import Lowered
from .program import Program

# Seconds for one kind of module in all, and while neither form is faster.
_LIMITS = Limits(most=1.0, patience=0.2)


@dataclass
class Timings:
    """Speeds by what was timed."""

    known: dict[Any, Speed] = field(default_factory=dict)

    def check(
        self,
        program: Program | ImageProgram,
        lowered: Lowered | ImageProgram,
        given: Arguments,
        own: Callable[..., Any],
    ) -> Speed:
        """How much faster the chain is than the module's own forward.

        Raises:
            NotUnderstood: it is not faster.
        """
        key = program.alike()
        if key not in self.known:
            self.known[key] = _measured(lowered, given, own)
        speed = self.known[key]
        if not speed.is_faster:
            raise NotUnderstood(f"a chain ({program.steps()}) is not faster here: {speed}")
        return speed


def _measured(lowered: Lowered | ImageProgram, given: Arguments, own: Callable[..., Any]) -> Speed:
    ours, theirs = copied(*given), copied(*given)
    pairs = Pairs(lambda: own(*theirs[0], **theirs[1]), lambda: lowered.run(*ours))
    return decide({1: pairs}, _LIMITS)[1]
