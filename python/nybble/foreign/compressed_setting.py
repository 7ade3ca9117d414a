"""What the configuration of compressed-tensors says of weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..checkpoint.files import CheckpointError
from .float_codes import block_of
from .source import Source
from .tensors import Tensors

FORMATS = (
    *("pack-quantized", "int-quantized", "naive-quantized", "dense", "marlin-24", "mixed-precision"),
    *("float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)
_GROUPS = ("group", "tensor_group")
_STRATEGIES = ("tensor", "channel", "block", *_GROUPS)
_FLOAT_BITS = (4, 8)
_DENSE_SINCE = (0, 18)  # the version from which on codes of 3, 5, 6 and 7 bits cross words


class Setting(NamedTuple):
    """How weights of a group of layers are quantized.

    ``group_size`` 0: a whole row, or all of the weight. ``ordered``: columns have groups. ``rows``: how many have the same
    scales, in blocks of ``group_size`` columns. ``floats``: codes are numbers with a sign, an exponent and a fraction.
    """

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool
    rows: int = 1
    floats: bool = False

    def groups(self, inputs: int) -> int:
        """How many groups a row of so many inputs has; 0 where they are not whole groups, which only blocks may not be."""
        if not self.group_size:
            return 1
        return 0 if inputs % self.group_size and self.rows == 1 else -(-inputs // self.group_size)

    def fits(self, scale: Tensor, n: int, k: int) -> bool:
        """Whether a weight (N, K) may have such scales."""
        whole = not self.group_size and scale.numel() == 1  # of the strategy tensor
        return whole or tuple(scale.shape) == (-(-n // self.rows), self.groups(k))

    def spread(self, values: Tensor, n: int, k: int) -> Tensor:
        """Scales that fit, or zero points, as (N, groups)."""
        if values.numel() == 1:
            return values.reshape(1, 1).repeat(n, self.groups(k))
        return values.repeat_interleave(self.rows, dim=0)[:n] if self.rows > 1 else values


class Context(NamedTuple):
    """What reading a layer needs besides its tensors. ``dense_words``: whether codes cross words; None: not told."""

    tensors: Tensors
    settings: tuple[Setting, ...]
    dense_words: bool | None

    def setting(
        self, name: str, fits: Callable[[Setting], bool], holds: Callable[[Setting], bool] | None = None
    ) -> Setting:
        """The only setting whose tensors would be those that a layer has.

        holds: whether it has all codes, of a layout that is the same with any bits: where settings differ in nothing else, the
            fewest bits that hold all codes are right.
        """
        has_zero, has_order = (
            f"{name}.{part}" in self.tensors.entries for part in ("weight_zero_point", "weight_g_idx")
        )
        found = [setting for setting in self.settings if fits(setting) and (has_zero or setting.symmetric)]
        # Some versions write zero points of symmetric weights, and the columns of those that are in order, too.
        found = [setting for setting in found if setting.symmetric != has_zero] or found
        found = [setting for setting in found if setting.ordered == has_order] or found
        if holds is not None and len({setting._replace(bits=0) for setting in found}) == 1:
            return min([setting for setting in found if holds(setting)] or found)
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
    bits, kind = told.get("num_bits", 8), told.get("type", "int")
    if kind not in ("int", "float"):
        raise CheckpointError(f"{where}: type {kind!r}: must be 'int' or 'float'")
    if not _whole(bits) or not 2 <= bits <= 8 or (kind == "float" and bits not in _FLOAT_BITS):
        rule = "must be in [2, 8]" if kind == "int" else f"of floats, must be one of {_FLOAT_BITS}"
        raise CheckpointError(f"{where}: num_bits {bits!r}: {rule}")
    symmetric = told.get("symmetric", True)
    if not isinstance(symmetric, bool) or (kind == "float" and not symmetric):
        rule = "must be true or false" if kind == "int" else "of floats, must be true"
        raise CheckpointError(f"{where}: symmetric {symmetric!r}: {rule}")
    rows, size = _sizes(where, told)
    return Setting(bits, size, symmetric, told.get("actorder") == "group", rows, kind == "float")


def _sizes(where: str, told: dict[str, Any]) -> tuple[int, int]:
    """The rows and columns of a group of weights; 0 columns: a whole row."""
    size = told.get("group_size")
    if size is not None and (not _whole(size) or not (size == -1 or 1 <= size < 1 << 31)):
        raise CheckpointError(f"{where}: group_size {size!r}: must be null, -1 or at least 1")
    strategy = told.get("strategy") or ("channel" if size in (None, -1) else "group")
    if strategy not in _STRATEGIES:
        raise CheckpointError(f"{where}: strategy {strategy!r}: must be one of {', '.join(_STRATEGIES)}")
    if (strategy in _GROUPS) != (size not in (None, -1)):
        raise CheckpointError(f"{where}: group_size {size!r}: does not go with strategy {strategy!r}")
    if strategy != "block":
        return 1, max(size or 0, 0)
    return block_of(told.get("block_structure"), f"{where}: block_structure")


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def dense_words(source: Source) -> bool | None:
    """Whether codes of 3, 5, 6 and 7 bits cross words, by the version that wrote the file; None: it is not told."""
    version = source.quantization.get("version")
    match = re.match(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    return None if match is None else (int(match[1]), int(match[2])) >= _DENSE_SINCE
