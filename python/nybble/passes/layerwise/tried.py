"""The schemes that were tried for a layer, as plain data of a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...report.data import Tried
from ...report.speed import Speed

_NUMBER, _TEXT = (float, int, type(None)), (str, type(None))


def to_plain(tried: Sequence[Tried]) -> list[dict[str, Any]]:
    """As mappings and numbers."""
    return [asdict(one) for one in tried]


def from_plain(data: object) -> tuple[Tried, ...] | None:
    """The inverse of ``to_plain``; None if the data is not of its form."""
    if not isinstance(data, list):
        return None
    found = [_one(item) for item in data]
    return None if None in found else tuple(one for one in found if one is not None)


def _one(item: object) -> Tried | None:
    if not isinstance(item, dict) or item.keys() != {"scheme", "error", "speed", "why"}:
        return None
    speed = None if item["speed"] is None else _speed(item["speed"])
    is_right = isinstance(item["scheme"], str) and type(item["error"]) in _NUMBER and type(item["why"]) in _TEXT
    if not is_right or (speed is None) is not (item["speed"] is None):
        return None
    return Tried(item["scheme"], item["error"], speed, item["why"])


def _speed(item: object) -> Speed | None:
    if not isinstance(item, dict) or item.keys() != {"ratio", "low", "high", "pairs"}:
        return None
    is_right = type(item["pairs"]) is int and all(type(item[key]) is float for key in ("ratio", "low", "high"))
    return Speed(**item) if is_right else None
