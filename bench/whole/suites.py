"""The presets of whole models: which models each runs, and its goals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..modules import table as modules
from . import goals
from .goals import Goal
from .lines import Row
from .models import MODELS, Model


@dataclass(frozen=True)
class Suite:
    """What a preset measures."""

    models: Mapping[str, Model]
    goals: Sequence[Goal]


WHOLE, MODULES = "whole-models", "modules"
SUITES: dict[str, Suite] = {WHOLE: Suite(MODELS, goals.GOALS), MODULES: Suite(modules.MODELS, modules.GOALS)}


def find(name: str) -> Model:
    """The model of this name."""
    return next(suite.models[name] for suite in SUITES.values() if name in suite.models)


def of(rows: Iterable[Row]) -> Suite:
    """The suite of the preset that wrote result lines."""
    return SUITES[next((row.get("preset") for row in rows if row["kind"] == "run"), None) or WHOLE]
