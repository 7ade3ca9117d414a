"""JSON from files that nobody vouches for: limits on nesting and numbers, no name twice, and values short in messages."""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any

from .files import CheckpointError

_DIGITS = 40  # of an integer
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_CHARACTERS = 120  # of a value in a message

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _CHARACTERS
_SHORT.maxlevel, _SHORT.maxlong = 3, 40
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


def short(value: object) -> str:
    """A value for a message, shortened: a damaged or hostile file may hold very long or deep values."""
    text = _SHORT.repr(value)
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 3]}..."


def parse(data: bytes, where: str, deepest: int, *, integers_only: bool = False) -> Any:
    """A JSON value. ``where``: for messages; ``deepest``: how many objects and lists may be inside each other.

    Raises CheckpointError if it is not UTF-8, not JSON, nested deeper, has a name twice in an object, or an integer of more
    than 40 digits, or if it has floats and ``integers_only`` is set.
    """

    def no_float(text: str) -> Any:
        raise CheckpointError(f"{where}: {short(text)}: numbers must be integers")

    def integer(text: str) -> int:
        if len(text) > _DIGITS:
            raise CheckpointError(f"{where}: the number {text[:18]}... is too large")
        return int(text)

    hooks: dict[str, Any] = {"parse_float": no_float, "parse_constant": no_float} if integers_only else {}
    try:
        text = data.decode()
        _check_depth(data, where, deepest)
        return json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, where), parse_int=integer, **hooks)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not JSON: {error}") from error


def _check_depth(data: bytes, where: str, deepest: int) -> None:
    """Checked before parsing, which is recursive."""
    bare = re.sub(rb'"[^"]*"', b"", data.replace(b"\\\\", b"").replace(b'\\"', b""))
    left = brackets = bare.translate(None, _NO_BRACKETS)
    for _ in range(deepest):  # each round takes a level away, much faster than counting brackets
        left = re.sub(rb"\[\]|\{\}", b"", left)
        if not left:
            return
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > deepest:
            raise CheckpointError(f"{where}: nested deeper than {deepest}")


def _once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise CheckpointError(f"{where}: {short(twice)} is there twice")
    return found
