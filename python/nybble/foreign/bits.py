"""Codes of a few bits, packed in bytes or in words of 32 bits, to one code a byte."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..compiled.codes import unpack_bits

Bytes = NDArray[np.uint8]


def unpack_stream(packed: Bytes, bits: int, count: int) -> Bytes:
    """Rows of bytes (R, B) to codes (R, count): code i is bits [i * bits, i * bits + bits) of its row, low bit first."""
    if bits == 8:
        return packed[:, :count]
    if bits == 4:
        return halves(packed)[:, :count]
    return unpack_bits(torch.from_numpy(packed), bits, count).numpy()


def unpack_planes(packed: Bytes, bits: int, count: int) -> Bytes:
    """Rows of bytes (R, B) to codes (R, count), of which each 32 are in ``bits`` words: planes of 4, 2 and 1 bits, as their sum needs
    them, the lowest bits of codes first; each plane is a stream."""
    blocks = packed.reshape(len(packed), -1, bits * 4)
    codes = np.zeros((len(packed), blocks.shape[1], 32), np.uint8)
    low = 0
    for width in (width for width in (8, 4, 2, 1) if bits & width):
        plane = np.ascontiguousarray(blocks[:, :, low * 4 : (low + width) * 4]).reshape(-1, width * 4)
        codes |= unpack_stream(plane, width, 32).reshape(codes.shape) << np.uint8(low)
        low += width
    return codes.reshape(len(packed), -1)[:, :count]


def unpack_words(packed: NDArray[np.uint32], bits: int, count: int) -> Bytes:
    """Rows of words (R, W) to codes (R, count): 32 // bits codes a word, low bits first; a code never crosses words."""
    rows, words = packed.shape
    each = 32 // bits
    codes = np.empty((rows, words, each), np.uint8)
    for i in range(each):
        codes[:, :, i] = (packed >> np.uint32(i * bits)) & np.uint32((1 << bits) - 1)
    return codes.reshape(rows, -1)[:, :count]


def as_bytes(words: NDArray[np.uint32]) -> Bytes:
    """Rows of words as rows of bytes."""
    return np.ascontiguousarray(words).view(np.uint8)


def halves(packed: Bytes) -> Bytes:
    """Bytes (..., B) to nibbles (..., 2 * B), the low one of each byte first."""
    codes = np.empty((*packed.shape, 2), np.uint8)
    codes[..., 0] = packed & np.uint8(15)
    codes[..., 1] = packed >> np.uint8(4)
    return codes.reshape(*packed.shape[:-1], -1)


def pairs(raw: Bytes) -> Bytes:
    """Bytes (..., B) with the codes 0 to B in their low halves, and the others in the high ones, to pairs of codes (..., B)."""
    two = np.ascontiguousarray(raw).view(np.uint16)  # codes 2 i and 2 i + 1 in the low halves of its bytes
    codes = np.empty((*raw.shape[:-1], 2, raw.shape[-1] // 2), np.uint8)
    codes[..., 0, :] = (two & 0x0F) | ((two >> 4) & 0xF0)
    codes[..., 1, :] = ((two >> 4) & 0x0F) | ((two >> 8) & 0xF0)
    return codes.reshape(raw.shape)


def pack_stream(codes: Bytes, bits: int) -> Bytes:
    """The inverse of unpack_stream: codes (R, count) below 2 ** bits to bytes (R, ceil(count * bits / 8))."""
    rows, count = codes.shape
    if bits == 8:
        return codes
    if bits == 4:
        even, odd = codes[:, ::2], codes[:, 1::2] << np.uint8(4)
        packed = np.array(even)
        packed[:, : odd.shape[1]] |= odd
        return packed
    periods = -(-count // 8)
    parts = np.pad(codes, ((0, 0), (0, periods * 8 - count))).reshape(rows, periods, 8)
    packed = np.zeros((rows, periods, bits), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[:, :, byte] |= parts[:, :, i] << np.uint8(shift)
        if shift + bits > 8:
            packed[:, :, byte + 1] |= parts[:, :, i] >> np.uint8(8 - shift)
    return packed.reshape(rows, -1)[:, : -(-count * bits // 8)]


def as_words(packed: Bytes) -> NDArray[np.int32]:
    """Rows of bytes as rows of words of 32 bits; the last one is filled up with zeros."""
    return np.ascontiguousarray(np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))).view(np.int32)
