"""Whether nybble's schemes hold a foreign weight exactly, and if not, why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..compiled.codes import select_nibbles
from ..weights.rounding import QuantizedWeight, check_portable, dequantize_weight
from ..weights.scheme import Scheme
from ..weights.weight_type import WeightType, weight_types
from .weight import ForeignWeight

_AT_ONCE = 1 << 20  # weights that are compared at a time


@dataclass(frozen=True)
class Fit:
    """A scheme that holds a weight, and the weight in it; or why none does.

    near: where only last bits differ, the scheme that has the weight's codes, and the weight in it.
    """

    scheme: Scheme | None = None
    quantized: QuantizedWeight | None = None
    why: str | None = None
    near: Fit | None = None


def fit(weight: ForeignWeight, act_bits: int = 16) -> Fit:
    """The scheme whose weight equals the foreign one bit for bit as float32.

    Raises ValueError if no scheme has activations of ``act_bits``.
    """
    if weight.levels is not None and (found := _two_levels(weight, act_bits)) is not None:
        return found
    found = Fit()
    for kind in _kinds_of(weight):
        found = _fit(weight, kind, act_bits)
        if found.scheme is not None:
            break
    return found


def _fit(weight: ForeignWeight, kind: WeightType, act_bits: int) -> Fit:
    """As fit, with one type of weights."""
    foreign = in_rows(weight)
    weight, order = _prepared(foreign, kind)
    size, why = _form(weight, kind, act_bits)
    if why is not None:
        return Fit(why=why)
    if _counted_alike(weight, kind):
        stored, zero = _mirrored(weight, kind)
    else:
        stored, zero, outside = _by_rows(weight, kind)
        if outside:
            code = min(outside) if min(outside) < kind.ends[0] else max(outside)
            return Fit(why=f"code {code - kind.middle} ({outside[code]} times): {kind.name} has not this code")
    if zero is not None and (zero.min() < kind.ends[0] or zero.max() > kind.ends[1]):
        return Fit(why=f"a zero point outside [{kind.ends[0]}, {kind.ends[1]}]")
    found = _held(weight, stored, zero, _scheme(weight, kind, act_bits, size, zero, order), order)
    assert found.scheme is not None and found.quantized is not None  # noqa: S101, PT018
    # Where float zero points have become minimums, the steps are others.
    same = foreign.float_zero is None and _same_steps(weight, found.quantized)
    if not same and not _equal(foreign, found.quantized, found.scheme):
        rounds = str(weight.arithmetic).removeprefix("torch.")
        return Fit(why=f"the library rounds twice in {rounds}, so that last bits differ", near=found)
    return found


def _two_levels(weight: ForeignWeight, act_bits: int) -> Fit | None:
    """The weight with its own levels, where a weight type has them."""
    kind, levels = weight_types()["w4k"], weight.levels
    plain = (weight.bits, weight.per_byte, weight.zero, weight.factor, weight.arithmetic, weight.group_size)
    if levels is None or plain != (kind.bits, kind.per_byte, 0, 1, torch.float32, kind.group_sizes[0]):
        return None
    scheme = Scheme(kind.bits, act_bits, weight.group_size, book=kind.book)
    found = QuantizedWeight(weight.codes, minimum=levels.minimum, scale=levels.scale, levels=levels.levels)
    check_portable(found, scheme, *weight.shape)
    return Fit(scheme, found)


def keep_codes(weight: ForeignWeight, act_bits: int = 16) -> Fit:
    """A scheme that has the weight's codes, at most clipped."""
    kind = _kinds_of(weight)[-1]
    weight, order = _prepared(in_rows(weight), kind)
    size, why = _form(weight, kind, act_bits)
    if why is not None:
        return Fit(why=why)
    codes, zero, _ = _by_rows(weight, kind)
    zero = None if zero is None else zero.clamp(*kind.ends)
    return _held(weight, codes, zero, _scheme(weight, kind, act_bits, size, zero, order), order)


def in_rows(weight: ForeignWeight) -> ForeignWeight:
    """The weight without groups that cross rows, where smaller ones of the same scales do not."""
    return weight if weight.flat_shape is None else weight.by_rows(*weight.shape) or weight


def _prepared(weight: ForeignWeight, kind: WeightType) -> tuple[ForeignWeight, Tensor | None]:
    """The same weight in groups of a size that a type of weights has, if smaller ones can be, with integer zero points or a
    float minimum; and the order of its columns, see _in_groups.
    """
    weight, order = _in_groups(weight)
    whole = weight.group_size >= weight.shape[1] and kind.whole_rows
    if weight.flat_shape is None and not whole and weight.group_size not in kind.group_sizes:
        parts = [size for size in kind.group_sizes if weight.group_size % size == 0]
        weight = weight.split(max(parts)) if parts else weight
    zero = weight.float_zero
    if zero is None:
        return weight, order
    if torch.equal(zero, zero.round()) and zero.abs().max() < 1 << 15:
        return replace(weight, zero=zero.to(torch.int16)), order
    # Signed codes are counted from the middle. Of two numbers of 11 to 13 bits the product is exact in float32.
    shift = 1 << (weight.bits - 1) if weight.bits == kind.bits and kind.stored.is_signed else 0
    return replace(weight, zero=shift, minimum=(shift - zero.float()) * weight.scale.float()), order


def _in_groups(weight: ForeignWeight) -> tuple[ForeignWeight, Tensor | None]:
    """The weight with the columns of each group together, in their order, and the input of each column; None: all are
    in order."""
    if weight.groups is None:
        return weight, None
    order = weight.groups.argsort(stable=True).to(torch.int32)
    codes = select_nibbles(weight.codes, order) if weight.per_byte == 2 else weight.codes[:, order]
    return replace(weight, codes=codes, groups=None), order


def _unpacked(weight: ForeignWeight) -> Tensor:
    """All codes, one in each element."""
    n, k = weight.stored_shape
    return weight.unpacked(slice(0, n), slice(0, k))


def _same_steps(weight: ForeignWeight, held: QuantizedWeight) -> bool:
    """Whether both weights are computed from the same numbers by the same steps in float32, and so are equal.

    Mirrored codes with mirrored zero points are the negative of exact differences, and products only change their signs.
    """
    scale = weight.scale.float()
    if weight.factor != 1 or weight.arithmetic is not torch.float32:
        return False
    if weight.minimum is not None and (held.minimum is None or not torch.equal(held.minimum.float(), weight.minimum)):
        return False
    return torch.equal(held.scale.float(), scale if weight.book is not None else scale.abs())


def _equal(weight: ForeignWeight, held: QuantizedWeight, scheme: Scheme) -> bool:
    """Whether both are the same weight bit for bit, after rounding once to the dtype in which the library computes; by some rows
    at a time, to take little memory."""
    n, k = weight.shape
    height = max(_AT_ONCE // k, 1)
    for row in range(0, n, height):
        rows = slice(row, row + height)
        own = dequantize_weight(held.rows(rows), scheme, k).to(weight.arithmetic).float()
        if not torch.equal(own, weight.rows(rows).dequantize()):
            return False
    return True


def _form(weight: ForeignWeight, kind: WeightType, act_bits: int) -> tuple[int | None, str | None]:
    """The group size of a scheme with the form of the weight, or why there is none with this type of weights."""
    size = weight.group_size
    whole = size >= weight.shape[1]
    why = _unlike(weight, kind)
    if why is None and act_bits not in kind.act_bits:
        why = f"a code book: {kind.name} has float activations, not a{act_bits}"
    if why is None and not (whole and kind.whole_rows) and size not in kind.group_sizes:
        allowed = ", ".join(map(str, kind.group_sizes))
        held = f"{kind.name} has groups of {allowed} or a whole row" if allowed else f"{kind.name} has one scale a row"
        why = f"groups of {size}: {held}"
    return None if whole and kind.whole_rows else size, why


def _held(weight: ForeignWeight, stored: Tensor, zeros: Tensor | None, scheme: Scheme, order: Tensor | None) -> Fit:
    kind = scheme.weight_type
    zero = None if zeros is None or kind.zero_point is None else zeros.to(kind.zero_point)
    scale = weight.scale if weight.factor == 1 else weight.scale.float() * weight.factor
    scale = scale if kind.table else scale.abs()
    dtype = _dtype_of([scale] if weight.minimum is None else [scale, weight.minimum], scheme)
    least = None if weight.minimum is None else weight.minimum.to(dtype)
    found = QuantizedWeight(stored, scale.to(dtype), zero, order, least, weight.book)
    check_portable(found, scheme, *weight.shape)
    return Fit(scheme, found)


def _scheme(
    weight: ForeignWeight,
    kind: WeightType,
    act_bits: int,
    size: int | None,
    zero: Tensor | None,
    order: Tensor | None,
) -> Scheme:
    symmetric = zero is None and weight.minimum is None
    return Scheme(kind.bits, act_bits, size, symmetric, ordered=order is not None, book=kind.book)


def _dtype_of(scales: list[Tensor], scheme: Scheme) -> torch.dtype:
    """The first dtype that has all scales: of one a row that of nybble's own rounding before others, which is the fastest;
    else the smaller ones before others."""
    kind = scheme.weight_type
    dtypes = [kind.scale, *kind.other_scales]
    if scheme.group_size is not None or not scheme.symmetric:
        dtypes.sort(key=lambda dtype: dtype.itemsize)
    exact = (dtype for dtype in dtypes if all(torch.equal(s.to(dtype).float(), s.float()) for s in scales))
    return next(exact, kind.scale)


def _kinds_of(weight: ForeignWeight) -> list[WeightType]:
    """The types of weights that may hold it, the smallest first."""
    if weight.book is not None and weight.bits <= 4:
        return [weight_types()["w4nf"]]
    three = weight_types()["w3"]
    small = [three] if weight.bits == three.bits and weight.group_size in three.sizes else []
    return [*small, weight_types()["w8" if weight.bits > 4 else "w4"]]


def _unlike(weight: ForeignWeight, kind: WeightType) -> str | None:
    """What no scheme with this type of weights has."""
    reasons = (
        (
            weight.book is not None and (not kind.table or weight.factor != 1),
            "a code book of other than 16 values, such as float8",
        ),
        (weight.minimum is not None and not kind.minimum, "a float minimum in place of an integer zero point"),
        (weight.minimum is not None and bool((weight.scale < 0).any()), "negative scales beside a float minimum"),
        (weight.minimum is not None and weight.factor != 1, "a factor of the sums with a float minimum"),
        (weight.flat_shape is not None, "groups that run over the flattened matrix"),
    )
    return next((why for holds, why in reasons if holds), None)


def _counted_alike(weight: ForeignWeight, kind: WeightType) -> bool:
    """Whether the weight's codes lie as the weight type has them, and count from the same zero."""
    if weight.per_byte == 1 or weight.per_byte != kind.per_byte:
        return False
    if weight.minimum is not None:
        return isinstance(weight.zero, int) and weight.zero == 0
    return bool(kind.table) or not isinstance(weight.zero, int) or weight.zero == kind.middle


def _mirrored(weight: ForeignWeight, kind: WeightType) -> tuple[Tensor, Tensor | None]:
    """As _codes, of a weight whose codes are counted alike, but with the codes as they are stored."""
    codes, zero, flips = weight.codes, weight.zero, weight.scale < 0
    if weight.minimum is not None or kind.table:
        return codes, None
    if flips.any():  # 15 - code is code ^ 15; no group begins within a byte
        masks, size = flips.to(torch.uint8) * 255, weight.group_size // weight.per_byte
        if flips.shape[1] * size == codes.shape[1]:
            codes = (codes.unflatten(1, (-1, size)) ^ masks[..., None]).flatten(1)
        else:
            codes = codes ^ masks.repeat_interleave(size, dim=1)[:, : codes.shape[1]]
        zero = torch.full(flips.shape, zero) if isinstance(zero, int) else zero
        zero = torch.where(flips, kind.lowest + kind.highest - zero, zero)
    return codes, None if isinstance(zero, int) else zero


def _by_rows(weight: ForeignWeight, kind: WeightType) -> tuple[Tensor, Tensor | None, Counter[int]]:
    """As _codes, of some rows at a time, to take little memory: codes as they are stored, zero points, and how often there is a
    code that the weight type does not have, in whose place its nearest one is stored."""
    n, k = weight.shape
    height = max(_AT_ONCE // k, 1)
    stored, outside = torch.empty(0), Counter[int]()
    zeros: list[Tensor | None] = []
    for with_zeros in (False, True):
        zeros, outside = [], Counter()
        for row in range(0, n, height):
            codes, zero = _codes(weight.rows(slice(row, row + height)), kind, with_zeros)
            outside.update(_outside(codes, kind))
            packed = kind.pack(codes.clamp_(*kind.ends))
            if row == 0:
                stored = packed.new_empty((n, *packed.shape[1:]))
            stored[row : row + height] = packed
            zeros.append(zero)
        if len({zero is None for zero in zeros}) == 1:
            break  # else some rows need zero points, so that all have them
    found = [zero for zero in zeros if zero is not None]
    return stored, torch.cat(found) if found else None, outside


def _outside(codes: Tensor, kind: WeightType) -> list[int]:
    """All codes that the weight type does not have."""
    low, high = (int(end) for end in codes.aminmax())
    lowest, highest = kind.ends
    if lowest <= low and high <= highest:
        return []
    found: list[int] = codes[(codes < lowest) | (codes > highest)].tolist()
    return found


def _codes(weight: ForeignWeight, kind: WeightType, with_zeros: bool) -> tuple[Tensor, Tensor | None]:
    """Codes (N, K) as the weight type counts them, and zero points (N, groups), or None where all are its middle, and may be.

    Of a group with a negative scale they are mirrored, lowest + highest - code, or negated where there are no zero points and
    signed codes have the negatives: that goes with the positive scale.
    """
    columns, flips = weight.column_groups(slice(0, weight.shape[1])), weight.scale < 0
    codes = _unpacked(weight).to(torch.int16)
    if weight.minimum is not None:
        return codes - (weight.zero if isinstance(weight.zero, int) else weight.zero[:, columns]), None
    if kind.table:
        return codes, None
    silent = (weight.scale == 0)[:, columns]  # weights of 0 whatever the codes, in which some libraries leave any
    steps = torch.where(silent, 0, codes - (weight.zero if isinstance(weight.zero, int) else weight.zero[:, columns]))
    signed = torch.where(flips[:, columns], -steps, steps)
    held = kind.stored.is_signed and signed.min() >= kind.ends[0] and signed.max() <= kind.ends[1]
    if not with_zeros and (held or (isinstance(weight.zero, int) and not flips.any())):
        return signed + kind.middle, None
    if isinstance(weight.zero, int):
        codes, zeros = steps + kind.middle, torch.full(weight.scale.shape, kind.middle)
    else:  # codes and zero points are counted from the lowest code on
        shift = _lowest(kind.stored, kind) - _lowest(weight.codes.dtype, kind)
        codes, zeros = codes + shift, weight.zero.to(torch.int16) + shift
        codes = torch.where(silent, zeros[:, columns], codes)
        if not flips.any():
            return codes, zeros
    ends = sum(kind.ends)
    return torch.where(flips[:, columns], ends - codes, codes), torch.where(flips, ends - zeros, zeros)


def _lowest(stored: torch.dtype, kind: WeightType) -> int:
    """The lowest code of as many bits as the weight type has, where codes are stored in a dtype."""
    return -(1 << (kind.bits - 1)) if stored.is_signed else 0
