"""What a preset is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from .peers import Peer
from .results import Row
from .shapes import Shape

THREADS = 2

Put = Callable[[Sequence[Row]], None]


@dataclass(frozen=True)
class Setup:
    """Arguments of a preset.

    shapes: for presets without fixed shapes. budget_s: seconds of timing per cell. put: outputs result lines. advance:
    called after each cell. done: result lines of an interrupted run. only: globs that restrict what runs. mark: fields
    added to each result line.
    """

    peers: Sequence[Peer]
    shapes: Sequence[Shape]
    budget_s: float
    ceilings: dict[str, Any]
    put: Put
    advance: Callable[[str], None]
    done: Sequence[Row] = ()
    only: Sequence[str] = ()
    mark: Mapping[str, Any] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        """Whether what has this name is to be run."""
        return not self.only or any(fnmatchcase(name, glob) for glob in self.only)
