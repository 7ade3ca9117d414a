"""The block types of GGUF: how many values a block has, in how many bytes, and how they become codes and scales.

A decoder gets the blocks of a weight, uint8 (blocks, nbytes), and gives codes (blocks, values), of 4 bits two a byte,
and, by block, scales, zero point and minimum of its groups. Scales of scales are multiplied out in float32, which is exact: 11 by 6 to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.files import CheckpointError
from .bits import Bytes, pairs

Floats = NDArray[np.float16] | NDArray[np.float32]

# What the codes of the types IQ4_* stand for.
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_FLOAT4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice what codes of MXFP4 stand for


class BlockLevels(NamedTuple):
    """What scales and minimums are products of: d and dmin (blocks, 1), and levels (blocks, 2 * groups of a block)."""

    d: NDArray[np.float16]
    dmin: NDArray[np.float16]
    levels: Bytes


class Decoded(NamedTuple):
    """Blocks as codes. ``scale`` and ``minimum``: (blocks, groups of a block). ``book``: the codes are places in it.

    ``codes``: (blocks, values), or of 4 bits (blocks, values / 2), the first of each byte in its low half.
    """

    codes: Bytes | NDArray[np.int8]
    bits: int
    scale: Floats
    zero: int = 0
    minimum: Floats | None = None
    book: tuple[int, ...] | None = None
    levels: BlockLevels | None = None

    @property
    def per_byte(self) -> int:
        """Codes in an element of ``codes``."""
        return 2 if self.bits == 4 else 1


Decoder = Callable[[Bytes], Decoded]


class BlockType(NamedTuple):
    """A type of tensors. ``decode`` is None for floats."""

    name: str
    values: int
    nbytes: int
    decode: Decoder | None = None


def _half(raw: Bytes, at: int) -> NDArray[np.float16]:
    """The float16 at a byte of each block, (blocks, 1)."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view(np.float16)


def _nibbles(raw: Bytes) -> Bytes:
    """Bytes (..., B) to nibbles (..., 2 * B): all low ones, then all high ones."""
    return np.concatenate([raw & np.uint8(15), raw >> np.uint8(4)], axis=-1)


def _fifth_bits(raw: Bytes) -> Bytes:
    """Four bytes a block to 32 codes: 16 where the bit is set."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little") << np.uint8(4)


def _q4_0(raw: Bytes) -> Decoded:
    return Decoded(pairs(raw[:, 2:]), 4, _half(raw, 0), 8)


def _q4_1(raw: Bytes) -> Decoded:
    return Decoded(pairs(raw[:, 4:]), 4, _half(raw, 0), 0, _half(raw, 2))


def _q5_0(raw: Bytes) -> Decoded:
    return Decoded(_nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6]), 5, _half(raw, 0), 16)


def _q5_1(raw: Bytes) -> Decoded:
    return Decoded(_nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8]), 5, _half(raw, 0), 0, _half(raw, 2))


def _q8_0(raw: Bytes) -> Decoded:
    return Decoded(np.ascontiguousarray(raw[:, 2:]).view(np.int8), 8, _half(raw, 0))


def _iq4_nl(raw: Bytes) -> Decoded:
    return Decoded(pairs(raw[:, 2:]), 4, _half(raw, 0), book=NONLINEAR)


def _two_bits(raw: Bytes) -> Bytes:
    """64 bytes a block to 256 codes: 32 bytes hold four times 32, the first in the lowest bits."""
    parts = raw.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return (parts & np.uint8(3)).reshape(-1, 256)


def _times(d: NDArray[np.float16], numbers: NDArray[np.integer]) -> NDArray[np.float32]:
    product: NDArray[np.float32] = d.astype(np.float32) * numbers.astype(np.float32)
    return product


def _q2_k(raw: Bytes) -> Decoded:
    low, high = raw[:, :16] & np.uint8(15), raw[:, :16] >> np.uint8(4)
    return Decoded(_two_bits(raw[:, 16:80]), 2, _times(_half(raw, 80), low), 0, -_times(_half(raw, 82), high))


def _q3_k(raw: Bytes) -> Decoded:
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    third = ((raw[:, None, :32] >> shifts) & np.uint8(1)).reshape(-1, 256) << np.uint8(2)
    packed = raw[:, 96:108]
    low = np.concatenate([packed[:, :8] & np.uint8(15), packed[:, :8] >> np.uint8(4)], axis=1)
    high = (packed[:, None, 8:] >> (np.arange(4, dtype=np.uint8) * 2).reshape(1, 4, 1)) & np.uint8(3)
    scales = (low | (high.reshape(-1, 16) << np.uint8(4))).astype(np.int16) - 32
    return Decoded(_two_bits(raw[:, 32:96]) | third, 3, _times(_half(raw, 108), scales), 4)


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """12 bytes a block to eight scales and eight minimums of 6 bits."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    two, four = np.uint8(6), np.uint8(4)
    scales = np.concatenate([a & np.uint8(63), (c & np.uint8(15)) | (a >> two << four)], axis=1)
    minimums = np.concatenate([b & np.uint8(63), (c >> four) | (b >> two << four)], axis=1)
    return scales, minimums


def _k_nibbles(raw: Bytes) -> Bytes:
    """128 bytes a block to 256 codes: each 32 bytes hold 32 low nibbles, then 32 high ones."""
    return _nibbles(raw.reshape(-1, 4, 32)).reshape(-1, 256)


def _q4_k(raw: Bytes) -> Decoded:
    scales, minimums = _six_bits(raw[:, 4:16])
    codes = pairs(raw[:, 16:].reshape(-1, 4, 32)).reshape(-1, 128)
    d, dmin, levels = _half(raw, 0), _half(raw, 2), np.stack([scales, minimums], axis=2).reshape(-1, 16)
    return Decoded(codes, 4, _times(d, scales), 0, -_times(dmin, minimums), levels=BlockLevels(d, dmin, levels))


def _q5_k(raw: Bytes) -> Decoded:
    scales, minimums = _six_bits(raw[:, 4:16])
    fifth = (raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & np.uint8(1)
    codes = _k_nibbles(raw[:, 48:]) | (fifth.reshape(-1, 256) << np.uint8(4))
    return Decoded(codes, 5, _times(_half(raw, 0), scales), 0, -_times(_half(raw, 2), minimums))


def _q6_k(raw: Bytes) -> Decoded:
    low = _nibbles(raw[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    codes = low | (_two_bits(raw[:, 128:192]) << np.uint8(4))
    return Decoded(codes, 6, _times(_half(raw, 208), np.ascontiguousarray(raw[:, 192:208]).view(np.int8)), 32)


def _iq4_xs(raw: Bytes) -> Decoded:
    high = np.ascontiguousarray(raw[:, 2:4]).view(np.uint16) >> (np.arange(8, dtype=np.uint16) * 2)
    low = np.stack([raw[:, 4:8] & np.uint8(15), raw[:, 4:8] >> np.uint8(4)], axis=2).reshape(-1, 8)
    scales = (low | ((high & 3) << 4)).astype(np.int16) - 32
    codes = pairs(raw[:, 8:].reshape(-1, 8, 16)).reshape(-1, 128)
    return Decoded(codes, 4, _times(_half(raw, 0), scales), book=NONLINEAR)


def _tq1_0(raw: Bytes) -> Decoded:
    """A byte has five ternary digits, of which the first is the highest of byte / 256 in base 3; those of the last four have four."""
    parts = []
    for begin, end, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        powers = np.array([3**i for i in range(digits)], np.uint8).reshape(1, digits, 1)
        parts.append((raw[:, None, begin:end] * powers).reshape(len(raw), -1))  # modulo 256
    codes = (np.concatenate(parts, axis=1).astype(np.uint16) * 3 >> 8).astype(np.uint8)
    return Decoded(codes, 2, _half(raw, 52), 1)


def _tq2_0(raw: Bytes) -> Decoded:
    return Decoded(_two_bits(raw[:, :64]), 2, _half(raw, 64), 1)


def _mxfp4(raw: Bytes) -> Decoded:
    scale = np.ldexp(np.float32(1), raw[:, :1].astype(np.int32) - 128)
    return Decoded(pairs(raw[:, 1:]), 4, scale.astype(np.float32), book=_FLOAT4)


# By the number that a file has for the type.
_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    30: BlockType("BF16", 1, 2),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs),
    34: BlockType("TQ1_0", 256, 54, _tq1_0),
    35: BlockType("TQ2_0", 256, 66, _tq2_0),
    39: BlockType("MXFP4", 32, 17, _mxfp4),
}


def block_type(number: int, where: str) -> BlockType:
    """The type of a tensor. Raises CheckpointError for one that is not read."""
    if number not in _TYPES:
        known = ", ".join(kind.name for kind in _TYPES.values())
        raise CheckpointError(f"{where}: type {number}: not one that is read: {known}")
    return _TYPES[number]
