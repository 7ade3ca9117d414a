"""What the configuration of compressed-tensors says of weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ..checkpoint.files import CheckpointError
from .source import Source
from .tensors import Tensors

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "dense", "marlin-24", "mixed-precision")
_STRATEGIES = ("tensor", "channel", "group")
_DENSE_SINCE = (0, 18)  # the version from which on codes of 3, 5, 6 and 7 bits cross words


class Setting(NamedTuple):
    """How weights of a group of layers are quantized. ``group_size`` 0: a whole row. ``ordered``: columns have groups."""

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool

    def groups(self, inputs: int) -> int:
        """How many groups a row of so many inputs has; 0 where they are not whole groups."""
        if not self.group_size:
            return 1
        return 0 if inputs % self.group_size else inputs // self.group_size


class Context(NamedTuple):
    """What reading a layer needs besides its tensors. ``dense_words``: whether codes cross words; None: not told."""

    tensors: Tensors
    settings: tuple[Setting, ...]
    dense_words: bool | None

    def setting(self, name: str, fits: Callable[[Setting], bool]) -> Setting:
        """The only setting whose tensors would have the shapes that a layer's have."""
        found = [setting for setting in self.settings if fits(setting)]
        if len(found) != 1:
            told = "; ".join(f"{s.bits} bits, group_size {s.group_size or None}" for s in self.settings) or "none"
            raise CheckpointError(
                f"{name}: the shapes of its tensors fit {len(found)} settings of config_groups, must be one: {told}"
            )
        return found[0]


def settings(source: Source) -> tuple[Setting, ...]:
    """The different settings of all groups of layers."""
    groups = source.quantization.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise CheckpointError(f"{source.path}: config_groups: must be an object")
    found = [_setting(f"{source.path}: config_groups: {name}", group) for name, group in groups.items()]
    return tuple(dict.fromkeys(setting for setting in found if setting is not None))


def _setting(where: str, group: Any) -> Setting | None:
    if not isinstance(group, dict):
        raise CheckpointError(f"{where}: must be an object")
    told = group.get("weights")
    if told is None:
        return None
    if not isinstance(told, dict):
        raise CheckpointError(f"{where}: weights: must be an object")
    bits, size = told.get("num_bits", 8), told.get("group_size")
    if told.get("type", "int") != "int":
        raise CheckpointError(f"{where}: type {told['type']!r}: must be 'int'; float codes are not read")
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise CheckpointError(f"{where}: num_bits {bits!r}: must be in [2, 8]")
    if size is not None and (
        not isinstance(size, int) or isinstance(size, bool) or not (size == -1 or 1 <= size < 1 << 31)
    ):
        raise CheckpointError(f"{where}: group_size {size!r}: must be null, -1 or at least 1")
    strategy = told.get("strategy") or ("channel" if size in (None, -1) else "group")
    if strategy not in _STRATEGIES:
        raise CheckpointError(f"{where}: strategy {strategy!r}: must be one of {', '.join(_STRATEGIES)}")
    if (strategy == "group") != (size not in (None, -1)):
        raise CheckpointError(f"{where}: group_size {size!r}: does not go with strategy {strategy!r}")
    symmetric = told.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise CheckpointError(f"{where}: symmetric {symmetric!r}: must be true or false")
    return Setting(bits, (size or 0) if strategy == "group" else 0, symmetric, told.get("actorder") == "group")


def dense_words(source: Source) -> bool | None:
    """Whether codes of 3, 5, 6 and 7 bits cross words, by the version that wrote the file; None: it is not told."""
    version = source.quantization.get("version")
    match = re.match(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    return None if match is None else (int(match[1]), int(match[2])) >= _DENSE_SINCE
