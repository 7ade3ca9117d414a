"""Numbers on the command line: argparse shows what is wrong with one in a line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser for ``type=`` of argparse, which shows the messages of its errors."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def count(text: str) -> int:
    """An integer above 0."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r}: must be an integer above 0")
    return int(text)


def counts(text: str) -> list[int]:
    """Integers above 0 with commas between them."""
    return [count(part) for part in text.split(",")]


def amount(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{text!r}: must be a number above 0")
    return value
