"""Checks of the arguments that passes share: scheme, include, exclude, m, goal, observer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from ..nn.composite import CompositeModule
from ..weights.scheme import Scheme
from .eligible import is_linear_like
from .observe import OBSERVERS
from .walk import Site

GOALS: tuple[str, ...] = ("speed", "no_slower", "memory")
TIMING_S = 10.0
MAX_ERROR = 0.05
Patterns = str | Sequence[str] | None


class Options(NamedTuple):
    """The options of a pass, checked.

    scheme: None if weights stay floats. others: the schemes that a layer may get in its place. max_error: the most that
    a layer's output error may be, or None. prunes: whether weights become sparse. include: None for all layers. observer: None unless activations are static.
    """

    scheme: Scheme | None
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    method: str
    m: tuple[int, ...]
    goal: str
    timing_s: float = TIMING_S
    observer: str | None = None
    others: tuple[Scheme, ...] = ()
    max_error: float | None = None
    prunes: bool = False

    @property
    def is_choice(self) -> bool:
        """Whether a layer's scheme, or whether it gets the only one, depends on its error."""
        return bool(self.others) or self.max_error is not None

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All schemes that a layer may get; none if weights stay floats."""
        return () if self.scheme is None else (self.scheme, *self.others)

    def why_not_asked(self, names: Iterable[str]) -> str | None:
        """Why include and exclude rule out the module with these names, or None."""
        names = tuple(names)
        if self.include is not None and not any(_matches(name, self.include) for name in names):
            return "not matched by include"
        for name in names:
            for pattern in self.exclude:
                if fnmatchcase(name, pattern):
                    return f"excluded by {pattern!r}"
        return None


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> str:
    """``value`` if it is one of ``choices``. Raises ValueError otherwise."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument}={value!r}: must be one of {', '.join(map(repr, choices))}")
    return value


def check_schemes(argument: str, schemes: str | Scheme | Iterable[str | Scheme]) -> tuple[Scheme, ...]:
    """The schemes without duplicates. Raises TypeError or ValueError."""
    asked = (schemes,) if isinstance(schemes, (str, Scheme)) or not isinstance(schemes, Iterable) else tuple(schemes)
    if not asked:
        raise ValueError(f"{argument}={schemes!r}: must be at least one scheme")
    return tuple(dict.fromkeys(map(Scheme.parse, asked)))


def check_observer(observer: str | None, *schemes: Scheme) -> str | None:
    """The observer of static schemes, "mse" by default; None without any. Raises ValueError."""
    if any(scheme.static for scheme in schemes):
        return check_choice("observer", "mse" if observer is None else observer, tuple(OBSERVERS))
    if observer is not None:
        raise ValueError(
            f"observer={observer!r}, scheme={', '.join(map(str, schemes)) or None!r}: needs a scheme with static "
            "activations, such as 'w8a8static'"
        )
    return None


def check_flag(argument: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument}={value!r}: must be True or False")


def check_seconds(argument: str, value: object) -> float:
    """``value`` if it is a finite number above 0. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}={value!r}: must be a number of seconds")
    if not 0 < value < math.inf:
        raise ValueError(f"{argument}={value!r}: must be finite and above 0")
    return float(value)


def check_share(argument: str, value: object) -> float:
    """``value`` if it is a number above 0 and at most 1. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}={value!r}: must be a number")
    if not 0 < value <= 1:
        raise ValueError(f"{argument}={value!r}: must be above 0 and at most 1")
    return float(value)


def check_progress(value: object) -> None:
    """Raise TypeError unless ``value`` is a bool or None."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"progress={value!r}: must be True, False or None")


def check_m(m: int | Sequence[int]) -> tuple[int, ...]:
    """The batch sizes as a tuple without duplicates. Raises TypeError or ValueError."""
    values = (m,) if isinstance(m, int) else m
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"m={m!r}: must be an int or a sequence of ints")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"m={m!r}: {value!r} must be an int")
        if not 1 <= value <= 1 << 20:
            raise ValueError(f"m={m!r}: {value} must be in 1..{1 << 20}")
    if not values:
        raise ValueError(f"m={m!r}: must have at least one batch size")
    return tuple(dict.fromkeys(values))


def check_patterns(argument: str, patterns: Patterns, sites: Sequence[Site]) -> tuple[str, ...]:
    """The glob patterns as a tuple. Raises TypeError, or ValueError for a pattern that matches nothing (a typo).

    A pattern of ``include`` must match a Linear-like layer, one of ``exclude`` any module without children; and either
    may match a module with several weights, which stands for all its members.
    """
    values = (patterns,) if isinstance(patterns, str) else patterns
    if values is None:
        return ()
    if not isinstance(values, Sequence):
        raise TypeError(f"{argument}={patterns!r}: must be a glob pattern or a sequence of them")
    fits = _is_layer if argument == "include" else _is_leaf
    what = "Linear layer" if argument == "include" else "layer"
    names = [name for site in sites if fits(site.module) for name in site.names]
    for pattern in values:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}={patterns!r}: {pattern!r} must be a string")
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:3]) or "none"
            raise ValueError(
                f"{argument}={patterns!r}: {pattern!r} matches no {what}; patterns are globs on full module names "
                f"('encoder.*' for everything inside encoder); this model has {some}{', ...' if len(names) > 3 else ''}"
            )
    return tuple(values)


def _is_layer(module: nn.Module) -> bool:
    return is_linear_like(module) or isinstance(module, CompositeModule)


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) or _is_layer(module)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
