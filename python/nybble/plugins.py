"""Rows that other packages add to nybble's tables: kernels, targets, layouts, schemes, checkpoint formats, module kinds.

A package adds a row with one line in its pyproject.toml, an entry point whose value is the row, or a tuple of rows:

    [project.entry-points."nybble.kernels"]
    toy = "toy_package.rows:KERNEL"

Importing nybble loads no plug-in. The first use of a table loads those of its group. ``NYBBLE_PLUGINS=0`` turns all off.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, TypeVar

from .callers import outside_level

VARIABLE = "NYBBLE_PLUGINS"
GROUPS = tuple(
    f"nybble.{table}"
    for table in ("kernels", "targets", "layouts", "schemes", "formats", "foreign", "writers", "modules")
)


class Row(Protocol):
    """A row of a table. Its name is unique in the table."""

    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Row)


class PluginError(RuntimeError):
    """A plug-in cannot be used. The message names the distribution, the entry point and the rule that it breaks."""


def rows(
    group: str,
    kind: type[R] | tuple[type[R], ...],
    built_in: Iterable[R] = (),
    wrong: Callable[[R], str | None] | None = None,
) -> tuple[R, ...]:
    """A table: nybble's own rows, then those of the plug-ins, ordered by distribution and entry point.

    The plug-ins are loaded at the first call and cached; a caller on a hot path caches the whole table.

    Args:
        group: one of GROUPS.
        kind: the type of the rows, or several.
        built_in: nybble's own rows.
        wrong: says which rule a plug-in's row breaks; None: none.

    Raises:
        PluginError: an entry point cannot be imported, its value is not a row or a tuple of rows, a row has a name
            that is already taken, or it breaks a rule.
    """
    table = tuple(built_in)
    owners = {row.name: "nybble itself" for row in table}
    for entry in _entry_points().get(group, ()):
        for row in _load(entry, kind):
            if row.name in owners:
                raise _refused(entry, f"the name {row.name!r} is taken by {owners[row.name]}; names must be unique")
            if wrong is not None and (rule := wrong(row)) is not None:
                raise _refused(entry, f"{_sort(row, kind)} {row.name!r} {rule}")
            owners[row.name] = _origin(entry)
            table += (row,)
    return table


@lru_cache
def _entry_points() -> dict[str, list[EntryPoint]]:
    """The entry points of each group, of all installed distributions."""
    value = os.environ.get(VARIABLE) or "1"
    if value not in ("0", "1"):
        raise PluginError(f"{VARIABLE}={value!r}: must be 0 (no plug-ins) or 1")
    if value == "0":
        return {}
    found = entry_points()
    for group in sorted(found.groups):
        if group.startswith("nybble.") and group not in GROUPS:
            names = ", ".join(_origin(entry) for entry in found.select(group=group))
            warnings.warn(
                f"{names}: unknown group of entry points; nybble reads {', '.join(GROUPS)}",
                RuntimeWarning,
                stacklevel=outside_level(),
            )
    return {group: sorted(found.select(group=group), key=_origin) for group in GROUPS}


@lru_cache
def _load(entry: EntryPoint, kind: type[R] | tuple[type[R], ...]) -> tuple[R, ...]:
    try:
        value = entry.load()
    except Exception as error:  # the plug-in's module may raise anything
        raise _refused(entry, f"cannot be imported: {type(error).__name__}: {error}") from error
    for row in value if isinstance(value, tuple) else (value,):
        if not isinstance(row, kind):
            names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise _refused(entry, f"is a {type(row).__name__}; must be a {names} or a tuple of them")
    return value if isinstance(value, tuple) else (value,)


def _sort(row: Row, kind: type | tuple[type, ...]) -> str:
    """Which of the types of a table's rows this is."""
    return next(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)) if isinstance(row, one))


def _refused(entry: EntryPoint, rule: str) -> PluginError:
    return PluginError(f"{_origin(entry)}: {rule}. {VARIABLE}=0 turns plug-ins off")


def _origin(entry: EntryPoint) -> str:
    """Where a row comes from, for messages."""
    dist = "an unknown distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
    return f"plug-in {dist}, entry point {entry.group}: {entry.name} = {entry.value}"
