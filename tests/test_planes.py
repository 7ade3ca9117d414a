"""Weights of 3 bits, which lie in memory as planes of bits (w3): layout, rounding, and what other libraries wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nybble import layouts
from nybble.foreign import open_foreign
from nybble.foreign.fit import fit
from nybble.nn import Embedding
from nybble.testing.oracle import random_weight
from nybble.weights.rounding import check_portable, dequantize_weight, quantize_weight
from nybble.weights.scheme import Scheme

DATA = Path(__file__).parent / "data" / "foreign"


def test_a_line_of_planes_is_what_pack_h_says() -> None:
    scheme = Scheme.parse("w3a16g32")
    quantized = random_weight(scheme, 16, 64)
    codes = scheme.weight_type.unpack(quantized.qweight, 64)
    planes = layouts.views(layouts.pack(quantized, "n16k32", scheme, 64), "n16k32", scheme, 16, 64)["codes"]
    assert planes.shape == (1, 2, 3, 16, 4)
    for n, k in ((0, 0), (3, 13), (7, 31), (15, 32), (9, 50), (4, 60), (11, 7)):
        line, place = k % 32 // 8, k % 8
        byte, half = place % 4, place // 4 * 4
        low = int(planes[0, k // 32, line // 2, n, byte]) >> half + line % 2 * 2 & 3
        high = int(planes[0, k // 32, 2, n, byte]) >> half + line & 1
        assert low + 4 * high == int(codes[n, k])


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("gptq-w3-g32", "w3a16g32"), ("ct-w3a16-g32", "w3a16g32")],
)
def test_files_of_3_bits_are_held_as_they_are(name: str, scheme: str) -> None:
    (opened,) = open_foreign(DATA / name)[1].layers.values()
    weight = opened.read()
    found = fit(weight)
    assert (str(found.scheme), found.why) == (scheme, None)
    assert torch.equal(dequantize_weight(found.quantized, found.scheme, weight.shape[1]), weight.dequantize())


def test_zero_points_beyond_3_bits_are_held_by_4_bits() -> None:
    (opened,) = open_foreign(DATA / "gptq-w3-g32")[1].layers.values()
    weight = opened.read()
    zero = torch.full(weight.scale.shape, 8, dtype=torch.int16)
    found = fit(weight.__class__(weight.codes, 3, weight.scale, zero, weight.group_size))
    assert str(found.scheme) == "w4a16g32asym"


def test_rounding_and_rows_of_an_embedding() -> None:
    weight = torch.randn(40, 320)
    errors = {}
    for name in ("w3a16g32", "w3a16g32asym", "w4a16g32asym"):
        scheme = Scheme.parse(name)
        quantized = quantize_weight(weight, scheme)
        check_portable(quantized, scheme, 40, 320)
        errors[name] = float((dequantize_weight(quantized, scheme, 320) - weight).norm() / weight.norm())
    assert errors["w4a16g32asym"] < errors["w3a16g32asym"] < errors["w3a16g32"] < 0.25
    table = Embedding.from_dense(nn.Embedding(40, 320, _weight=weight), "w3a16g32")
    ids = torch.randint(0, 40, (3, 5))
    assert torch.equal(table(ids), table.dequantized_weight()[ids])
