"""GPTQ's settings: those of the whole model, and under `dynamic` those of single layers.

`dynamic` has regular expressions, which are not run: a hostile one could take forever. Only names are read, as
`+:^model\\.layers\\.0\\.mlp\\.up_proj$`; `-:` marks layers that are not quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..checkpoint.files import CheckpointError
from .source import Source

_BITS = (2, 3, 4, 8)
_NAME = re.compile(r"([+-]:)?\^?((?:[\w-]|\\[.-])+)\$?")


class Setting(NamedTuple):
    """Of a layer. ``group_size`` -1: all inputs. ``zero``: the zero point of all groups; None: they have their own."""

    bits: int
    group_size: int
    zero: int | None

    @classmethod
    def of(cls, source: Source, told: Mapping[str, Any], where: str = "") -> Setting:
        """Raises CheckpointError for numbers that are not possible."""
        bits, size = told.get("bits"), told.get("group_size", 128)
        if not isinstance(bits, int) or isinstance(bits, bool) or bits not in _BITS:
            raise CheckpointError(f"{source.path}: {where}bits {bits!r}: must be one of {_BITS}")
        if not isinstance(size, int) or isinstance(size, bool) or not (size == -1 or 1 <= size < 1 << 31):
            raise CheckpointError(f"{source.path}: {where}group_size {size!r}: must be -1 (all inputs) or at least 1")
        return cls(bits, size, 1 << (bits - 1) if told.get("sym") is True else None)


def own_settings(source: Source) -> dict[str, Setting]:
    """The layers that have settings of their own.

    Raises CheckpointError where a rule is not the name of one layer.
    """
    rules = source.quantization.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise CheckpointError(f"{source.path}: dynamic {rules!r}: must be an object")
    found: dict[str, Setting] = {}
    for pattern, told in rules.items():
        match = _NAME.fullmatch(pattern)
        if match is None or not isinstance(told, dict):
            raise CheckpointError(f"{source.path}: dynamic {pattern!r}: must be the name of one layer, with an object")
        if match[1] != "-:":
            name = match[2].replace("\\", "")
            found.setdefault(name, Setting.of(source, {**source.quantization, **told}, f"dynamic {pattern!r}: "))
    return found
