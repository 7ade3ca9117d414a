"""Codes of a few bits, regrouped by the compiled library, against their definitions here: byte for byte."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nybble.compiled.codes import select_nibbles, transpose_nibbles, unpack_bits
from nybble.foreign.bits import pack_stream
from nybble.weights.weight_type import pack_codes, unpack_codes


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(least: int, below: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(least, below, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def stream(packed: Tensor, bits: int, count: int) -> Tensor:
    """The definition of unpack_bits: bit by bit."""
    each = packed[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    codes = each.flatten(1)[:, : count * bits].unflatten(1, (count, bits)).int() << torch.arange(bits)
    return codes.sum(-1).to(torch.uint8)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (3, 7), (17, 8), (33, 9), (16, 256), (5, 1000)])
def test_streams_of_codes(rows: int, count: int, bits: int, threads: int) -> None:
    for spare in (0, 1, 9):
        packed = numbers(0, 256, (rows, -(-count * bits // 8) + spare), torch.uint8)
        assert torch.equal(unpack_bits(packed, bits, count), stream(packed, bits, count))


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6, 7])
def test_streams_are_the_inverse_of_packing(bits: int) -> None:
    codes = numbers(0, 1 << bits, (19, 77), torch.uint8)
    packed = torch.from_numpy(pack_stream(codes.numpy(), bits))
    assert torch.equal(unpack_bits(packed, bits, 77), codes)


def test_streams_of_no_codes() -> None:
    assert unpack_bits(torch.empty(0, 3, dtype=torch.uint8), 3, 8).shape == (0, 8)
    assert unpack_bits(torch.empty(4, 3, dtype=torch.uint8), 3, 0).shape == (4, 0)


@pytest.mark.parametrize(("bits", "count", "told"), [(0, 8, "bits=0"), (8, 3, "bits=8"), (3, 9, "count=9")])
def test_streams_that_cannot_be(bits: int, count: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        unpack_bits(torch.zeros(2, 3, dtype=torch.uint8), bits, count)


@pytest.mark.parametrize(("rows", "k"), [(1, 2), (3, 6), (17, 8), (33, 130), (16, 512)])
def test_nibbles_in_another_order(rows: int, k: int, threads: int) -> None:
    packed = numbers(0, 256, (rows, k // 2), torch.uint8)
    for order in (torch.randperm(k), torch.randperm(k)[: k - 1], torch.zeros(k + 3, dtype=torch.int64)):
        expected = pack_codes(unpack_codes(packed, 2, k)[:, order], 2)
        assert torch.equal(select_nibbles(packed, order), expected)


@pytest.mark.parametrize("place", [-1, 12])
def test_an_order_beyond_the_row(place: int) -> None:
    with pytest.raises(ValueError, match=f"order={place}: must be in \\[0, 11\\]"):
        select_nibbles(torch.zeros(2, 6, dtype=torch.uint8), torch.tensor([0, place]))


@pytest.mark.parametrize(("k", "words"), [(1, 1), (2, 3), (63, 16), (64, 17), (130, 33), (256, 64)])
def test_transposed_nibbles(k: int, words: int, threads: int) -> None:
    packed = numbers(-(2**31), 2**31, (k, words), torch.int32)
    places = tuple(torch.randperm(8).tolist())
    shifts = torch.tensor(places, dtype=torch.int32) * 4
    codes = (packed[..., None] >> shifts & 15).flatten(1).T
    assert torch.equal(transpose_nibbles(packed, places), pack_codes(codes, 2))


@pytest.mark.parametrize("places", [(0, 1, 2, 3, 4, 5, 6, 6), (0, 1, 2, 3, 4, 5, 6, 8), (-1, 1, 2, 3, 4, 5, 6, 7)])
def test_places_that_are_no_permutation(places: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"places=.*: must be a permutation of 0 to 7"):
        transpose_nibbles(torch.zeros(2, 2, dtype=torch.int32), places)
