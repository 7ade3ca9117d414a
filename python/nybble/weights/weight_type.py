"""The types of weights, w4, w4nf, w8 and w16: how each is rounded and stored. A row of the table is a type.

A plug-in adds a type by an entry point of the group nybble.schemes. Its schemes are then parsed, rounded, saved and
loaded, and run by the reference, or by a kernel of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from .. import plugins
from .activation_type import activation_types
from .sparsity import Block, NofM, Sparsity, Unstructured


@dataclass(frozen=True)
class WeightType:
    """Weights as integer codes: weight = (code - zero_point) * scale.

    Args:
        bits: the number in the name of a scheme, w4.
        lowest, highest: the range of the codes that rounding makes.
        least: the lowest code that a weight may have, where other libraries make a lower one; None: lowest.
        middle: the zero point of symmetric weights.
        largest_step: the largest abs(code - zero_point), which limits the length of an int32 sum.
        stored: dtype of the tensor of codes.
        per_byte: codes in an element of that tensor: 1, or 2, 4 or 8 in a uint8, the first in the lowest bits.
        scale: dtype of the scales that rounding makes.
        other_scales: dtypes that the scales of a dense weight may have too: those of other libraries.
        minimum: whether an asymmetric weight may have float minimums in place of zero points, see Form.
        zero_point: dtype of the zero points of asymmetric weights; None: the weights are symmetric.
        group_sizes: numbers of inputs that may share a scale, besides a whole row.
        sparse_groups: whether sparse weights may have groups too; if not, they have a scale for each row.
        act_bits: the activations that go with it, 16 (float), 8 and 7 (quantized).
        patterns: the patterns of zeros that a sparse weight may have: classes of them, or single ones.
        book: the letters after the bits in the name of a scheme; no two types have the same bits and letters.
    """

    bits: int
    lowest: int
    highest: int
    middle: int
    largest_step: int
    stored: torch.dtype
    per_byte: int = 1
    scale: torch.dtype = torch.float32
    other_scales: tuple[torch.dtype, ...] = ()
    minimum: bool = False
    least: int | None = None
    zero_point: torch.dtype | None = None
    group_sizes: tuple[int, ...] = ()
    sparse_groups: bool = True
    act_bits: tuple[int, ...] = (8, 16)
    patterns: tuple[type[Sparsity] | Sparsity, ...] = ()
    book: str = ""

    @property
    def name(self) -> str:
        return f"w{self.bits}{self.book}"

    @property
    def table(self) -> tuple[float, ...]:
        """The value of each code in units of the scale, where codes index a table; empty where they are numbers."""
        return ()

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest code that a weight may have."""
        return self.lowest if self.least is None else self.least, self.highest

    @property
    def _storable(self) -> tuple[int, int]:
        """The lowest and the highest number that the bits of a stored code can hold."""
        if self.per_byte > 1:
            return 0, (1 << 8 // self.per_byte) - 1
        info = torch.iinfo(self.stored)
        return info.min, info.max

    def inconsistent(self) -> str | None:
        """Which rule the fields break; None: none."""
        if not 1 <= self.bits <= 99:
            return f"has bits={self.bits}: must be in [1, 99]"
        if not self.lowest < self.middle < self.highest:
            return f"has middle={self.middle}: must be between lowest={self.lowest} and highest={self.highest}"
        if self.per_byte not in (1, 2, 4, 8):
            return f"has per_byte={self.per_byte}: must be 1, 2, 4 or 8"
        if self.per_byte > 1 and (self.stored != torch.uint8 or self.lowest < 0 or self.highest >> 8 // self.per_byte):
            return f"has per_byte={self.per_byte}: needs stored=torch.uint8 and codes of {8 // self.per_byte} bits"
        known = activation_types()
        if not self.act_bits or not set(self.act_bits) <= known.keys():
            return f"has act_bits={self.act_bits}: must be one or more of {', '.join(map(str, known))}"
        if any(known[bits].quantized for bits in self.act_bits) and self.largest_step < 1:
            return f"has largest_step={self.largest_step}: must be at least 1 with quantized activations"
        return None

    def scales(self, low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Scales, as stored, and zero points (float) of groups whose values lie in [low, high], which includes 0."""
        if symmetric:
            # The range of codes may be longer on one side of the zero point: both ends must fit.
            span = torch.maximum(-low / (self.middle - self.lowest), high / (self.highest - self.middle))
            zero = torch.full_like(low, self.middle)
        else:
            span = (high - low) / (self.highest - self.lowest)
            zero = ((-low / torch.where(span > 0, span, 1)).round() + self.lowest).clamp(self.lowest, self.highest)
        scale = span.to(self.scale)
        # A scale that is 0 or subnormal as stored cannot tell codes apart: the whole group becomes 0.
        usable = scale.float() > torch.finfo(self.scale).tiny
        return torch.where(usable, scale, torch.zeros_like(scale)), zero

    def nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The codes (float) nearest to values; scale and zero point broadcast to them."""
        usable = scale > 0
        divisor = torch.where(usable, scale.to(values.dtype), 1)
        codes = ((values / divisor).round() + zero).clamp(self.lowest, self.highest)
        return torch.where(usable, codes, zero)

    def steps(self, codes: Tensor, zero: Tensor | int) -> Tensor:
        """Codes (float) in units of the scale."""
        return codes - zero

    def pack(self, codes: Tensor) -> Tensor:
        """Codes (N, K), numbers of any dtype, as they are stored, (N, ceil(K / per_byte))."""
        return codes.to(self.stored) if self.per_byte == 1 else pack_codes(codes, self.per_byte)

    def unpack(self, stored: Tensor, in_features: int) -> Tensor:
        """The inverse of pack."""
        return stored if self.per_byte == 1 else unpack_codes(stored, self.per_byte, in_features)

    def check(self, stored: Tensor, in_features: int) -> None:
        """Raises ValueError where the stored codes of a weight are not in range, or unused bits are not 0."""
        used = in_features % self.per_byte
        if used and (stored[:, -1] >> (used * 8 // self.per_byte)).any():
            raise ValueError("qweight: the bits beyond the last input must be 0")
        lowest, highest = self.ends
        least, most = self._storable
        if lowest <= least and most <= highest:
            return
        for code in (int(end) for end in self.unpack(stored, in_features).aminmax()):
            if not lowest <= code <= highest:
                raise ValueError(f"qweight: code {code} is outside [{lowest}, {highest}]")


@dataclass(frozen=True)
class FloatType(WeightType):
    """Weights that stay floating-point numbers: each code is the weight itself, with a scale of 1."""

    def scales(self, low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
        return torch.ones_like(low), torch.zeros_like(low)

    def nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return values.to(self.stored).to(values.dtype)

    def inconsistent(self) -> str | None:
        if not self.stored.is_floating_point or self.per_byte != 1 or self.group_sizes or self.zero_point is not None:
            return "needs stored=a float dtype, and neither per_byte, group_sizes nor zero_point"
        return f"has act_bits={self.act_bits}: must be (16,)" if self.act_bits != (16,) else None

    def check(self, stored: Tensor, in_features: int) -> None:
        if not torch.isfinite(stored).all():
            raise ValueError("qweight: must be finite")


@dataclass(frozen=True)
class TableType(WeightType):
    """Codes that index a table: weight = table[code] * scale, with the largest magnitude of a group as its scale.

    A weight has a table of its own, the tensor `book`; rounding uses the one of the type. ``middle`` is the code of 0.

    Args:
        entries: the values, ascending, the largest magnitude 1.
    """

    entries: tuple[float, ...] = ()

    @property
    def table(self) -> tuple[float, ...]:
        return self.entries

    def scales(self, low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
        scale = torch.maximum(-low, high).to(self.scale)
        usable = scale.float() > torch.finfo(self.scale).tiny
        return torch.where(usable, scale, torch.zeros_like(scale)), torch.full_like(low, self.middle)

    def nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        usable = scale > 0
        table = torch.tensor(self.entries, dtype=torch.float64, device=values.device)
        between = ((table[1:] + table[:-1]) / 2).to(values.dtype)
        units = values / torch.where(usable, scale.to(values.dtype), 1)
        codes = torch.bucketize(units.contiguous(), between).to(values.dtype)
        return torch.where(usable, codes, self.middle)

    def steps(self, codes: Tensor, zero: Tensor | int) -> Tensor:
        return torch.tensor(self.entries, dtype=codes.dtype, device=codes.device)[codes.long()]

    def inconsistent(self) -> str | None:
        if self.per_byte == 1 or len(self.entries) != self.highest + 1 or self.act_bits != (16,) or not self.book:
            return "needs a value for each of its codes, several codes in a byte, act_bits=(16,), and letters as book"
        if self.entries[self.middle] != 0 or self.zero_point is not None or self.patterns:
            return f"needs 0 at middle={self.middle}, and neither zero_point nor patterns"
        return super().inconsistent()


# The values of bitsandbytes' NF4: quantiles of a normal distribution (Dettmers and others, QLoRA, 2023, appendix E).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

_BUILT_IN = (
    WeightType(
        8,
        -127,
        127,
        0,
        largest_step=128,
        stored=torch.int8,
        least=-128,
        other_scales=(torch.bfloat16, torch.float16),
        minimum=True,
        zero_point=torch.int8,
        group_sizes=(16, 32, 64, 128),
        sparse_groups=False,
        act_bits=(7, 8, 16),
        patterns=(Unstructured, NofM, Block),
    ),
    WeightType(
        4,
        0,
        15,
        8,
        largest_step=15,
        stored=torch.uint8,
        per_byte=2,
        scale=torch.bfloat16,
        other_scales=(torch.float16, torch.float32),
        minimum=True,
        zero_point=torch.uint8,
        group_sizes=(16, 32, 64, 128),
        patterns=(Unstructured, NofM),
    ),
    TableType(
        4,
        0,
        15,
        7,
        largest_step=1,
        stored=torch.uint8,
        per_byte=2,
        group_sizes=(16, 32, 64, 128),
        scale=torch.bfloat16,
        other_scales=(torch.float16, torch.float32),
        act_bits=(16,),
        book="nf",
        entries=_NF4,
    ),
    FloatType(16, 0, 0, 0, largest_step=0, stored=torch.bfloat16, act_bits=(16,), patterns=(NofM(2, 4),)),
)


# What holds as many bytes as a byte holds codes. These machines are little-endian: byte 0 is the lowest.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@lru_cache
def weight_types() -> dict[str, WeightType]:
    """The table, by name: nybble's own types, then those of plug-ins.

    Raises:
        plugins.PluginError: a plug-in breaks a rule.
    """
    rows = plugins.rows("nybble.schemes", WeightType, _BUILT_IN, lambda row: row.inconsistent())
    return {row.name: row for row in rows}


def pack_codes(codes: Tensor, per_byte: int) -> Tensor:
    """Unsigned codes (N, K) to bytes (N, ceil(K / per_byte)), the first code of each in the lowest bits."""
    codes = codes.to(torch.uint8, memory_format=torch.contiguous_format)
    if missing := -codes.shape[1] % per_byte:
        codes = zero_pad(codes, (0, missing))
    words, closer = codes.view(_WORDS[per_byte]), 8 - 8 // per_byte
    packed = words.clone()
    for i in range(1, per_byte):
        packed |= words >> closer * i  # code i of the word comes to its place in the lowest byte
    return packed.to(torch.uint8)


def unpack_codes(packed: Tensor, per_byte: int, in_features: int) -> Tensor:
    """The inverse of pack_codes: uint8 (N, in_features)."""
    bits = 8 // per_byte
    wide = packed.to(_WORDS[per_byte], memory_format=torch.contiguous_format)
    words = wide.clone()
    for i in range(1, per_byte):
        words |= wide << (8 - bits) * i  # code i of the byte comes to the lowest bits of byte i
    mask = sum(((1 << bits) - 1) << 8 * i for i in range(per_byte))
    return words.bitwise_and_(mask).view(torch.uint8)[:, :in_features]
