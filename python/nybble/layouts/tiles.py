"""Dense weights for CPUs: the layouts n16k4, n16k16, n16k4g, n16k16g, n16k8, n16k16n and n16k32. csrc/pack.h draws them.

n16k4   8 bits: tiles of 16 output features, 4 inputs in a 32-bit word; float32 scales; sums of the codes, for the
        kernels that multiply u8 x s8; a bit for each pair of lines of a tile with large sums, for those that multiply
        u7 x s8
n16k16  8 bits: as n16k4 without that bit, but words i and i + 2 of 16 inputs lie side by side in an output feature,
        which is the operand of a matrix instruction
n16k4g  8 bits with scales by group, of bfloat16, float16 or float32: lines as in n16k4, but codes and zero points are
        stored plus 128, in uint8; sums of the weights, as in n16k8
n16k16g 8 bits with scales by group: as n16k4g, but the words of 16 inputs lie as in n16k16
n16k32  3 bits: the lines of n16k8, of 32 inputs in three words: two have the lower two bits of each code, one the third
n16k8   4 bits: tiles of 16 output features, 8 inputs in a 32-bit word, of which byte j holds inputs j (low nibble) and
        j + 4; scales in bfloat16, float16 or float32; sums of the weights, which take out the zero point of the activations
n16k16n 4 bits: as n16k8, but two words of 16 inputs lie side by side in an output feature

Weights with levels (w4k) have scales and minimums of blocks of groups, and then the levels of the groups.

They end with the order of the columns, of an ordered scheme. Codes of a table (w4nf) have the table at the end
instead of the sums.

Padding: output features to 16, with code 0 and scale 0; inputs to the group size, or without
groups to 4 (n16k4, n16k4g), 8 (n16k8) or 16 (n16k16, n16k16g, n16k16n), with code 0. The activations there are 0 too, so the padding adds nothing.

Here is the definition in torch. The compiled library packs faster, and equal byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from .. import native
from ..weights.form import USUAL, Form
from ..weights.levels import blocks_of
from ..weights.rounding import QuantizedWeight, Ranges, portable_spec
from ..weights.scheme import Scheme
from .layout import Layout, Spec, round_up

TILE_N = 16
# Two lines of n16k4 whose codes of one sign sum to more than this at some k and k + 1 of a column are marked, in a byte for
# LARGE_K inputs: times 7 bits, the sums fit in 16 bits elsewhere.
LARGE_K, LARGE_SUM = 64, 258
# Inputs of which half the words lie beside the other half, in layouts of lines side by side.
PAIRED_K = 16
# Inputs whose codes of 3 bits lie in three words.
PLANES_K = 32
# Portable tensors that are sections as they are.
_WHOLE = ("order", "book")

_PER_GROUP = ("scale", "zero_point", "minimum", "levels")


@dataclass(frozen=True)
class _Kind:
    """A layout of this file. word: inputs in a 32-bit word, or in three. by_group: scales belong to groups. offset: what is added
    to codes and zero points where they are stored. paired: lines lie side by side, two by two."""

    word: int
    by_group: bool
    offset: int = 0
    paired: bool = False

    @property
    def unit(self) -> int:
        """Inputs that are padded to."""
        return PAIRED_K if self.paired else self.word

    @property
    def words(self) -> tuple[int, ...]:
        """The words of so many inputs of a tile: the dimensions of its codes but the last, their 4 bytes."""
        if self.paired:
            return PAIRED_K // self.word // 2, TILE_N, 2
        return (3, TILE_N) if self.word == PLANES_K else (TILE_N,)


def _padded(unit: int, scheme: Scheme, out_features: int, in_features: int) -> tuple[int, int]:
    return round_up(out_features, TILE_N), round_up(in_features, scheme.group_size or unit)


def _sections(like: _Kind, form: Form, scheme: Scheme, out_features: int, in_features: int) -> dict[str, Spec]:
    kind = scheme.weight_type
    n, k = _padded(like.unit, scheme, out_features, in_features)
    tiles = n // TILE_N
    per_group = (tiles, k // (scheme.group_size or k), TILE_N)
    spec: dict[str, Spec] = {
        "codes": ((tiles, k // like.unit, *like.words, 4), torch.uint8 if like.offset else kind.stored),
        "scale": (per_group, form.scale or kind.scale),
    }
    if kind.levels:
        spec["scale"] = spec["minimum"] = ((tiles, blocks_of(per_group[1]), TILE_N), kind.scale)
        spec["levels"] = ((tiles, 2 * per_group[1], TILE_N), torch.uint8)
    elif form.minimum:
        spec["minimum"] = spec["scale"]
    elif not scheme.symmetric and kind.zero_point is not None:
        spec["zero_point"] = (per_group, torch.uint8 if like.offset else kind.zero_point)
    if not like.by_group:
        spec["column_sum"] = ((tiles, TILE_N), torch.int32)
        if not like.paired:
            spec["large"] = ((tiles, -(-k // LARGE_K)), torch.uint8)
    elif not kind.table:
        spec["weight_sum"] = ((tiles, TILE_N), torch.float32)
    portable = portable_spec(scheme, out_features, in_features)
    return spec | {name: portable[name] for name in _WHOLE if name in portable}


def _fill(like: _Kind, quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> dict[str, Tensor]:
    out_features, word = quantized.qweight.shape[0], min(like.word, 8)
    n, k = _padded(like.unit, scheme, out_features, in_features)
    rows = n - out_features
    codes = zero_pad(scheme.weight_type.unpack(quantized.qweight, in_features), (0, k - in_features, 0, rows))
    tiled = codes.view(-1, TILE_N, k // word, word).transpose(1, 2)
    if like.by_group:
        total = _weight_sum(quantized, scheme, in_features)
        lines = tiled[..., :4] | (tiled[..., 4:] << 4) if word == 8 else _moved(tiled, like.offset)
        if like.word == PLANES_K:
            lines = _to_planes(lines)
        filled = {"codes": lines, "weight_sum": zero_pad(total, (0, rows)).float()}
    else:
        filled = {"codes": tiled, "column_sum": codes.sum(dim=1, dtype=torch.int32)}
        if not like.paired:
            filled["large"] = _large(tiled)
    if like.paired:
        filled["codes"] = _to_pairs(like, filled["codes"])
    for name in _PER_GROUP:
        tensor = quantized.tensors().get(name)
        if tensor is not None:
            padded = zero_pad(tensor, (0, 0, 0, rows))
            padded = _moved(padded, like.offset) if name == "zero_point" else padded
            filled[name] = padded.view(-1, TILE_N, padded.shape[1]).transpose(1, 2)
    return filled | {name: tensor for name, tensor in quantized.tensors().items() if name in _WHOLE}


def _moved(stored: Tensor, offset: int) -> Tensor:
    """Signed numbers as they are stored with an offset, uint8."""
    return (stored.to(torch.int16) + offset).to(torch.uint8) if offset else stored


def _back(stored: Tensor, offset: int) -> Tensor:
    """The inverse of _moved, int8."""
    return (stored.to(torch.int16) - offset).to(torch.int8) if offset else stored


def _weight_sum(quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> Tensor:
    """The sum of the weights of each row, float64: exact unless the scales span many octaves."""
    size, (scale, least) = scheme.group_size or in_features, quantized.steps
    steps = scheme.weight_type.unpack(quantized.qweight, in_features).double()
    if least is None:
        steps -= Ranges.of(quantized, scheme).spread_zeros(size, in_features)
    sums = zero_pad(steps, (0, -in_features % size)).unflatten(1, (-1, size)).sum(dim=2) * scale.double()
    if least is not None:
        counts = torch.arange(0, in_features, size).neg().add(in_features).clamp(max=size)
        sums += counts * least.double()
    total: Tensor = sums.sum(dim=1)
    return total


def _large(tiled: Tensor) -> Tensor:
    """The section of this name for codes (tiles, lines, TILE_N, 4)."""
    tiles, lines = tiled.shape[:2]
    pairs = tiled[:, : lines // 2 * 2].int().view(tiles, lines // 2, 2, TILE_N, 2, 2)
    above, below = pairs.clamp(min=0).sum(dim=(2, 5)), pairs.clamp(max=0).sum(dim=(2, 5))
    marked = ((above > LARGE_SUM) | (below < -LARGE_SUM)).flatten(2).any(dim=2)
    bits = zero_pad(marked.to(torch.uint8), (0, round_up(lines, 16) // 2 - lines // 2)).view(tiles, -1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=2, dtype=torch.uint8)


def _collect(
    like: _Kind, parts: dict[str, Tensor], scheme: Scheme, out_features: int, in_features: int
) -> QuantizedWeight:
    codes = _back(parts["codes"], like.offset)
    if like.word == PLANES_K:
        codes = _of_planes(codes)
    if like.paired:
        codes = _of_pairs(codes)
    if like.word != 4:
        codes = torch.cat((codes & 15, codes >> 4), dim=-1)
    codes = codes.transpose(1, 2).flatten(0, 1).flatten(1)[:out_features, :in_features]
    per_group = {
        name: parts[name].transpose(1, 2).flatten(0, 1)[:out_features].contiguous()
        for name in _PER_GROUP
        if name in parts
    }
    if "zero_point" in per_group:
        per_group["zero_point"] = _back(per_group["zero_point"], like.offset)
    whole = {name: parts[name].clone() for name in _WHOLE if name in parts}
    return QuantizedWeight(scheme.weight_type.pack(codes).contiguous(), **per_group, **whole)


def _to_pairs(like: _Kind, lines: Tensor) -> Tensor:
    """Lines (tiles, lines, TILE_N, 4) as (tiles, lines / 2 / half, half, TILE_N, 2, 4), half being those of PAIRED_K inputs over 2."""
    split: Tensor = lines.unflatten(1, (-1, 2, like.words[0]))
    return split.movedim(2, 4)


def _of_pairs(pairs: Tensor) -> Tensor:
    """The inverse of _to_pairs."""
    return pairs.movedim(4, 2).flatten(1, 3)


def _to_planes(lines: Tensor) -> Tensor:
    """Lines of nibbles below 8 (tiles, lines, TILE_N, 4) to planes (tiles, lines / 4, 3, TILE_N, 4)."""
    first, second, third, fourth = lines.unflatten(1, (-1, 4)).unbind(2)
    low = [(one & 0x33) | (other & 0x33) << 2 for one, other in ((first, second), (third, fourth))]
    high = sum((line >> 2 & 0x11) << i for i, line in enumerate((first, second, third, fourth)))
    return torch.stack([*low, torch.as_tensor(high)], dim=2)


def _of_planes(planes: Tensor) -> Tensor:
    """The inverse of _to_planes."""
    third = planes[:, :, 2]
    lines = [(planes[:, :, i // 2] >> i % 2 * 2 & 0x33) | (third >> i & 0x11) << 2 for i in range(4)]
    return torch.stack(lines, dim=2).flatten(1, 2)


def _rows(like: _Kind, parts: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The sections of some rows, as tiles of one row."""
    of_lanes = -3 if like.paired else -2
    tile, lane = rows.long() // TILE_N, rows.long() % TILE_N
    tiled = {name: parts[name][tile, :, lane].unsqueeze(2) for name in _PER_GROUP if name in parts}
    tiled["codes"] = parts["codes"].movedim(of_lanes, 1)[tile, lane].unsqueeze(of_lanes)
    return tiled | {name: parts[name] for name in _WHOLE if name in parts}


def _layout(name: str, like: _Kind, mask: str, form: Form = USUAL) -> Layout:
    return Layout(
        form.of_layout(name),
        partial(_sections, like, form),
        partial(_fill, like),
        partial(_collect, like),
        partial(_padded, like.unit),
        own_pack=partial(native.pack, layout=name),
        own_unpack=partial(native.unpack, layout=name, form=form),
        device="cpu",
        mask=mask,
        form=form,
        a_scale_a_row=not like.by_group,
        rows=partial(_rows, like),
        of_form=partial(_layout, name, like, mask) if like.by_group else None,
    )


# Inputs in a 32-bit word, or in three, by the bits of a code.
_WORDS = {8: 4, 4: 8, 3: PLANES_K}
_MASKS = {"n16k4": "mask8", "n16k8": "mask4"}


def _kind(row: native.TiledLayout) -> _Kind:
    by_group = row.grouped or row.bits != 8
    return _Kind(_WORDS[row.bits], by_group=by_group, offset=128 if row.grouped else 0, paired=row.paired)


LAYOUTS = tuple(_layout(name, _kind(row), _MASKS.get(name, "")) for name, row in native.TILED.items())
