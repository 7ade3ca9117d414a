"""GPTQ's settings: those of the whole model, and under `dynamic` (auto-round: `extra_config`) those of single layers.

`dynamic` has regular expressions, which are not run: a hostile one could take forever. Names are read, as
`+:^model\\.layers\\.0\\.mlp\\.up_proj$`. Settings of other expressions are possible for all layers, of which the shapes of their
tensors tell. `-:` marks layers that are not quantized, which have no such tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..checkpoint.files import CheckpointError
from .source import Source
from .tensors import Tensors

PLANES = "gptq_p"  # a layout of codes, see bits.unpack_planes, with zero points as they are
_FORMATS = ("gptq", "gptq_v2", PLANES)
_BITS = {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), PLANES: tuple(range(2, 9))}
_DENSE = 16  # bits of layers that are not quantized
# Where settings of single layers are told -> what is the name of one: gptqmodel's expressions, and auto-round's names.
_RULES = {
    "dynamic": re.compile(r"(?:\+:)?\^?((?:[\w-]|\\[.-])+)\$?"),
    "extra_config": re.compile(r"([\w.-]+)"),
}


def format_of(source: Source) -> str:
    """The layout of codes and zero points. Raises CheckpointError for one that is not known."""
    return source.text("checkpoint_format", _FORMATS, source.text("format", _FORMATS, "gptq"))


class Setting(NamedTuple):
    """Of a layer. ``group_size`` -1: all inputs. ``zero``: the zero point of all groups; None: they have their own."""

    bits: int
    group_size: int
    zero: int | None

    @classmethod
    def of(cls, source: Source, told: Mapping[str, Any], where: str = "") -> Setting:
        """Raises CheckpointError for numbers that are not possible."""
        bits, size = told.get("bits"), told.get("group_size", 128)
        allowed = _BITS[format_of(source)]
        if not isinstance(bits, int) or isinstance(bits, bool) or bits not in allowed:
            raise CheckpointError(f"{source.path}: {where}bits {bits!r}: must be one of {allowed}")
        if not isinstance(size, int) or isinstance(size, bool) or not (size == -1 or 1 <= size < 1 << 31):
            raise CheckpointError(f"{source.path}: {where}group_size {size!r}: must be -1 (all inputs) or at least 1")
        return cls(bits, size, 1 << (bits - 1) if told.get("sym") is True else None)

    def fits(self, name: str, tensors: Tensors) -> bool:
        """Whether a layer has tensors of the shapes that these settings give them."""
        shapes = [tensors.entries[f"{name}.{part}"].shape for part in ("qweight", "qzeros")]
        if any(len(shape) != 2 for shape in shapes):
            return False
        (rows, n), zeros = shapes
        k = rows * 32 // self.bits
        return zeros == (1 if self.group_size == -1 else -(-k // self.group_size), n * self.bits // 32)


class Settings(NamedTuple):
    """``common`` ones, those that are told for a layer by its name, and those that are told by expressions for some."""

    common: Setting
    named: dict[str, Setting]
    others: tuple[Setting, ...]

    def of(self, name: str, tensors: Tensors) -> Setting:
        """Those of a layer. Raises CheckpointError where the shapes of its tensors do not tell."""
        if name in self.named or not self.others:
            return self.named.get(name, self.common)
        found = [one for one in (self.common, *self.others) if one.fits(name, tensors)]
        if len({one.group_size for one in found}) > 1:
            told = ", ".join(str(one.group_size) for one in found)
            raise CheckpointError(
                f"{name}.scales: its shape fits the settings of dynamic with group_size {told}: must be one"
            )
        if not found:
            return self.common  # whose shapes are then asked for by name
        return found[0] if len({one.zero for one in found}) == 1 else found[0]._replace(zero=None)


def settings(source: Source) -> Settings:
    """Raises CheckpointError for what no setting is."""
    named: dict[str, Setting] = {}
    others: list[Setting] = []
    for key, form in _RULES.items():
        rules = source.quantization.get(key) or {}
        if not isinstance(rules, dict):
            raise CheckpointError(f"{source.path}: {key} {rules!r}: must be an object")
        for pattern, told in rules.items():
            if pattern.startswith("-:"):
                continue
            if not isinstance(told, dict):
                raise CheckpointError(f"{source.path}: {key} {pattern!r}: must have an object of settings")
            if told.get("bits") == _DENSE:
                continue
            setting = Setting.of(source, {**source.quantization, **told}, f"{key} {pattern!r}: ")
            match = form.fullmatch(pattern)
            if match is None:
                others.append(setting)
            else:
                named.setdefault(match[1].replace("\\", ""), setting)
    return Settings(Setting.of(source, source.quantization), named, tuple(dict.fromkeys(others)))
