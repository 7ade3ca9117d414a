"""What dicts of modules hold, noted to find changes."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

Item = tuple[dict[str, Any], str, Any]

_COMPARED = (bool, int, float, str)  # others are the same only if they are one object


class Sizes:
    """How many items dicts have."""

    def __init__(self, dicts: Iterable[dict[str, Any]] = ()) -> None:
        self._dicts = tuple(dicts)
        self._sizes = tuple(map(len, self._dicts))

    def differ(self) -> bool:
        """Whether one of them has more or fewer now."""
        return tuple(map(len, self._dicts)) != self._sizes


class Held:
    """Items of dicts as they were: (dict, key, value). Compared by loops in C, since every fused call does it."""

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._items = tuple(items)
        self._owners = tuple(owner for owner, _, _ in self._items)
        self._keys = tuple(key for _, key, _ in self._items)
        self._values = tuple(value for _, _, value in self._items)

    def differs(self) -> bool:
        """Whether one of the values is another object now."""
        return not all(map(is_, map(dict.get, self._owners, self._keys), self._values))

    def unequal(self) -> bool:
        """Whether one of the values, constants of Python or functions, is not equal to what it was."""
        return self.differs() and not all(_equal(owner.get(key), value) for owner, key, value in self._items)

    def first_other(self) -> tuple[str, Any]:
        """The key and the new value of the first that is another."""
        return next((key, owner.get(key)) for owner, key, value in self._items if owner.get(key) is not value)


def _equal(now: Any, before: Any) -> bool:
    if now is before or type(now) is not type(before):
        return now is before
    if isinstance(before, tuple):
        return len(now) == len(before) and all(map(_equal, now, before))
    return type(before) in _COMPARED and bool(now == before)
