"""Check the values of a recipe against the type hints of the arguments that they become."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

Field = tuple[str | int, ...]


class FieldError(ValueError):
    """A field of a recipe is wrong; ``field`` is its path, such as ("stages", 0, "scheme")."""

    def __init__(self, field: Field, why: str) -> None:
        super().__init__(f"{name_of(field)}: {why}")
        self.field, self._why = field, why

    def inside(self, outer: Field) -> FieldError:
        """The same error, with the field's path inside another field."""
        return FieldError((*outer, *self.field), self._why)


class Plain(str):
    """An unquoted scalar in a file; whether it is text, a number, a bool or null depends on the field's type."""

    __slots__ = ()


class _Misfit(Exception):
    """The value is not of the type."""


def name_of(field: Field) -> str:
    """The path of a field as text, such as ``stages[0].layers['*.head']``; "the recipe" for the empty path."""
    text = ""
    for key in field:
        word = isinstance(key, str) and re.fullmatch(r"\w+", key)
        text += (f".{key}" if text else str(key)) if word else f"[{key!r}]"
    return text or "the recipe"


def fit(value: object, hint: Any, field: Field) -> Any:
    """Convert ``value`` to a type: None, bool, int, float, str, a sequence (to a tuple), a mapping, or a union of these.

    Raises:
        FieldError: the value does not have the type.
    """
    try:
        return _fit(value, hint)
    except _Misfit:
        raise FieldError(field, f"{_short(value)} must be {_words(hint)}") from None


def _fit(value: object, hint: Any) -> Any:
    for read, arguments in _choices(hint):
        try:
            return read(value, arguments)
        except _Misfit:
            continue
    raise _Misfit


@cache
def _choices(hint: Any) -> tuple[tuple[Callable[[Any, Any], Any], Any], ...]:
    """What may read values of a type, each with the arguments of its type, in the order of ``_READERS``."""
    members = _members(hint)
    found = ((read, kind, member) for kind, read in _READERS.items() for member in members)
    return tuple((read, get_args(member)) for read, kind, member in found if (get_origin(member) or member) is kind)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _none(value: object, _: Any) -> None:
    if not (value is None or (isinstance(value, Plain) and value in ("", "~", "null"))):
        raise _Misfit


def _bool(value: object, _: Any) -> bool:
    if isinstance(value, Plain) and value in ("true", "false"):
        return value == "true"
    if isinstance(value, bool):
        return value
    raise _Misfit


def _int(value: object, _: Any) -> int:
    if isinstance(value, Plain) and re.fullmatch(r"[-+]?\d{1,18}", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _Misfit


def _float(value: object, _: Any) -> float:
    if isinstance(value, Plain) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
        value = float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise _Misfit


def _str(value: object, _: Any) -> str:
    if not isinstance(value, str):
        raise _Misfit
    return str(value)


def _sequence(value: object, args: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _Misfit
    return tuple(_fit(item, args[0]) for item in value)


def _mapping(value: object, args: Any) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _Misfit
    return {_fit(key, args[0]): _fit(item, args[1]) for key, item in value.items()}


# In the order in which the members of a union are tried; text accepts every scalar, so it is last.
_READERS: dict[Any, Callable[[object, Any], Any]] = {
    NoneType: _none,
    bool: _bool,
    int: _int,
    float: _float,
    Sequence: _sequence,
    Mapping: _mapping,
    str: _str,
}
_WORDS = {NoneType: "null", bool: "true or false", int: "an integer", float: "a number", str: "text"}


def _words(hint: Any) -> str:
    """The type in words; of a union, the members that a file can hold."""
    return " or ".join(_word(member) for member in _members(hint) if (get_origin(member) or member) in _READERS)


def _word(member: Any) -> str:
    kind, args = get_origin(member) or member, get_args(member)
    if kind is Sequence:
        return f"a list, each {_words(args[0])}"
    return f"a mapping to {_words(args[1])}" if kind is Mapping else _WORDS[kind]


def _short(value: object) -> str:
    text = repr(str(value) if isinstance(value, Plain) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
