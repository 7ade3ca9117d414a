"""A quantized weight as another library's file holds it: nothing is rounded, nothing is converted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import CheckpointError
from ..weights.levels import Levels
from ..weights.weight_type import unpack_codes

_AT_ONCE = 1 << 20  # elements that are dequantized at a time
_LEAST = 16  # weights of a group, at least, into which others are split
_MOST = 2.0**100  # of a scale: products with codes stay finite


@dataclass(frozen=True)
class ForeignWeight:
    """A weight (N, K) of a foreign checkpoint.

    weight = ((code - zero) * scale + minimum) * factor, or (book[code] * scale) * factor: in ``arithmetic``, which
    rounds after each operation.

    codes: (N, K), uint8 or int8, one code in each element; or, with per_byte 2, uint8 (N, K / 2).
    bits: of a code.
    scale: (N, groups), in the dtype of the file; float32 where the file has scales of scales.
    zero: the zero points (N, groups), int16 or, where they are no whole numbers, floats; or one number for all.
    group_size: column k has the scale of group k // group_size.
    groups: (K,), int32: the group of each column, where it is not that one.
    minimum: (N, groups), or None: none.
    book: the value of each code, float32, or None: the code itself.
    factor: a number that the library multiplies with last, in float32.
    arithmetic: the dtype in which the library dequantizes. With float32 (and for GPTQ and AWQ) one rounding of
        the result to the library's dtype gives the library's bits.
    flat_shape: (N, K) where groups run over the flattened matrix, and may cross rows: ``codes`` is (1, N * K) then.
    input_scale, input_zero: of static activations, as the file has them.
    levels: what scales and minimums are products of, where the file has them as levels of 6 bits; see Levels.
    per_byte: 2: each element of ``codes`` has two codes of 4 bits, the first in the low half, as WeightType has them.
    """

    codes: Tensor
    bits: int
    scale: Tensor
    zero: Tensor | int = 0
    group_size: int = 0
    groups: Tensor | None = None
    minimum: Tensor | None = None
    book: Tensor | None = None
    factor: float = 1.0
    arithmetic: torch.dtype = torch.float32
    flat_shape: tuple[int, int] | None = None
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
    per_byte: int = 1
    levels: Levels | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.flat_shape or self.stored_shape

    @property
    def stored_shape(self) -> tuple[int, int]:
        """That of the matrix of codes: (1, N * K) where groups run over the flattened matrix."""
        return self.codes.shape[0], self.codes.shape[1] * self.per_byte

    @property
    def symmetric(self) -> bool:
        """Whether all zero points are one number, and there is no minimum."""
        return isinstance(self.zero, int) and self.minimum is None

    @property
    def float_zero(self) -> Tensor | None:
        """The zero points where they are no whole numbers; None: they are."""
        return self.zero if isinstance(self.zero, Tensor) and self.zero.is_floating_point() else None

    def dequantize(self) -> Tensor:
        """The weight (N, K), float32."""
        result = torch.empty(self.stored_shape)
        for rows, columns in self._pieces():
            result[rows, columns] = self._piece(rows, columns)
        return result.reshape(self.shape)

    def _pieces(self) -> Iterator[tuple[slice, slice]]:
        """Parts of the matrix that are small, so that only the result takes much memory."""
        n, k = self.stored_shape
        width = min(k, max(_AT_ONCE // self.group_size, 1) * self.group_size)
        height = max(_AT_ONCE // width, 1)
        for row in range(0, n, height):
            for column in range(0, k, width):
                yield slice(row, row + height), slice(column, min(column + width, k))

    def _piece(self, rows: slice, columns: slice) -> Tensor:
        codes, kind = self.unpacked(rows, columns), self.arithmetic
        shape = codes.shape
        scale, zero, minimum = (self._spread(one, rows, columns) for one in (self.scale, self.zero, self.minimum))
        if scale.dim() == 3:
            codes = codes.reshape(len(codes), -1, self.group_size)
        # Codes and their differences have up to 9 bits: exact in bfloat16 too.
        weight = codes.to(kind, copy=True) if self.book is None else self.book[codes.int()].to(kind)
        if self.book is None and (isinstance(zero, Tensor) or zero):
            weight -= zero
        weight *= scale
        if minimum is not None:
            weight += minimum
        weight = weight.reshape(shape).float()
        return weight if self.factor == 1.0 else weight.mul_(self.factor)

    def unpacked(self, rows: slice, columns: slice) -> Tensor:
        """Some codes, one in each element."""
        if self.per_byte == 1:
            return self.codes[rows, columns]
        first, count = columns.start // self.per_byte, columns.stop - columns.start
        stored, skip = self.codes[rows, first : -(-columns.stop // self.per_byte)], columns.start % self.per_byte
        return unpack_codes(stored, self.per_byte, skip + count)[:, skip:]

    def _spread(self, value: Any, rows: slice, columns: slice) -> Any:
        """What each group has, in the dtype of the arithmetic, as it broadcasts to codes: (rows, groups, 1), where groups are
        whole and lie side by side; else (rows, columns)."""
        if not isinstance(value, Tensor):
            return value
        first, last, size = columns.start, columns.stop, self.group_size
        if self.groups is None and first % size == 0 and last % size == 0:
            return value[rows, first // size : last // size, None].to(self.arithmetic)
        return value[rows, self.column_groups(columns)].to(self.arithmetic)

    def column_groups(self, columns: slice) -> Tensor:
        """The group of each of some columns."""
        if self.groups is not None:
            return self.groups[columns].long()
        return torch.arange(columns.start, columns.stop) // self.group_size

    def by_rows(self, n: int, k: int) -> ForeignWeight | None:
        """The weight with groups over the flattened matrix as one of N rows, whose groups may have to be parts of the old ones;
        None: a group has less than 16 weights that are not of another row.
        """
        size = math.gcd(k, self.group_size)
        if (size < _LEAST and size != self.group_size) or k % self.per_byte:
            return None
        one = self.split(size)
        zero = one.zero if isinstance(one.zero, int) else one.zero.reshape(n, -1)
        minimum = None if one.minimum is None else one.minimum.reshape(n, -1)
        codes, scale = one.codes.reshape(n, -1), one.scale.reshape(n, -1)
        return replace(one, codes=codes, scale=scale, zero=zero, minimum=minimum, flat_shape=None)

    def split(self, size: int) -> ForeignWeight:
        """The same weight with groups of ``size``, which divides the size of its groups; ``groups`` must be None."""
        if size == self.group_size:
            return self
        count = -(-self.stored_shape[1] // size)

        def spread(value: Tensor) -> Tensor:
            return value.repeat_interleave(self.group_size // size, dim=1)[:, :count]

        return replace(
            self,
            scale=spread(self.scale),
            zero=self.zero if isinstance(self.zero, int) else spread(self.zero),
            minimum=None if self.minimum is None else spread(self.minimum),
            group_size=size,
            levels=None,
        )

    def rows(self, order: Tensor | slice) -> ForeignWeight:
        """Some rows of the weight, or all in another order."""
        zero = self.zero if isinstance(self.zero, int) else self.zero[order]
        minimum = None if self.minimum is None else self.minimum[order]
        levels = None if self.levels is None else Levels(*(part[order] for part in self.levels))
        return replace(
            self, codes=self.codes[order], scale=self.scale[order], zero=zero, minimum=minimum, levels=levels
        )

    def describe(self) -> str:
        """Its kind in words: two weights of one kind have the same."""
        k = self.stored_shape[1]
        float_zero = self.float_zero is not None
        asymmetric = (
            "float minimum" if self.minimum is not None else "float zero points" if float_zero else "asymmetric"
        )
        sign = "symmetric" if self.symmetric else asymmetric
        size = "one scale a row" if self.group_size >= k and self.flat_shape is None else f"groups of {self.group_size}"
        parts = [f"{self.bits} bits", size, "code book" if self.book is not None else sign]
        if self.flat_shape is not None:
            parts.append("over the flattened matrix")
        if self.groups is not None:
            parts.append("columns in activation order")
        scales = str(self.scale.dtype).removeprefix("torch.") if self.levels is None else "two-level"
        return ", ".join([*parts, f"{scales} scales"])


def checked(weight: ForeignWeight, name: str, scale: str, *, zero_scales: bool = False) -> ForeignWeight:
    """The weight itself, after its tensors were found to fit each other and to be usable numbers.

    Args:
        name: of the layer, for messages.
        scale: what the file calls the scales.
        zero_scales: whether codes that are not 0 may have a scale of 0.

    Raises:
        CheckpointError: what is wrong; it names the layer and the field.
    """
    n, k = weight.stored_shape
    if not n or not k:
        raise CheckpointError(f"{name}: a weight of shape ({n}, {k}) has no elements")
    if weight.group_size < 1:
        raise CheckpointError(f"{name}: group_size {weight.group_size}: must be at least 1")
    spread = (n, -(-k // weight.group_size))
    for field in ("scale", "zero", "minimum"):
        value = getattr(weight, field)
        if isinstance(value, Tensor) and tuple(value.shape) != spread:
            rule = f"groups of {weight.group_size} of ({n}, {k}) weights need {spread}"
            raise CheckpointError(f"{name}.{scale if field == 'scale' else field}: {tuple(value.shape)}, but {rule}")
    zero = weight.float_zero
    for field, value in (
        (scale, weight.scale),
        ("zero", zero),
        ("minimum", weight.minimum),
        ("code book", weight.book),
    ):
        if value is not None and not (value.abs().float() < _MOST).all():
            raise CheckpointError(f"{name}.{field}: must be finite, and below 2 ** 100")
    if not zero_scales and weight.minimum is None and weight.book is None and (weight.scale == 0).any():
        unscaled = replace(weight, scale=(weight.scale == 0).float(), arithmetic=torch.float32)
        if unscaled.dequantize().any():
            raise CheckpointError(f"{name}.{scale}: is 0 for weights that are not 0")
    if weight.groups is not None:
        _check_groups(weight.groups, name, weight.scale.shape[1], k)
    return weight


def _check_groups(groups: Tensor, name: str, count: int, k: int) -> None:
    if tuple(groups.shape) != (k,):
        raise CheckpointError(f"{name}.g_idx: {tuple(groups.shape)}, must be ({k},)")
    low, high = (int(end) for end in groups.aminmax())
    if low < 0 or high >= count:
        raise CheckpointError(
            f"{name}.g_idx: {low if low < 0 else high}: must be in [0, {count - 1}], a group of the scales"
        )


def ordered_groups(groups: Tensor, name: str, group_size: int, count: int) -> Tensor | None:
    """The group of each column as a file tells them, or None where that is k // group_size.

    Raises:
        CheckpointError: a group that the scales do not have, or that has not as many columns as group_size says.
    """
    k = groups.shape[0]
    _check_groups(groups, name, count, k)
    natural = torch.arange(k, dtype=torch.int32) // group_size
    if torch.equal(groups.to(torch.int32), natural):
        return None
    sizes, expected = (torch.bincount(of.long(), minlength=count) for of in (groups, natural))
    if not torch.equal(sizes, expected):
        group = int((sizes != expected).nonzero()[0])
        rule = f"group {group} has {int(sizes[group])} columns, must have {int(expected[group])}"
        raise CheckpointError(f"{name}.g_idx: {rule} (group_size {group_size})")
    return groups.to(torch.int32)
