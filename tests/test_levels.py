"""Weights whose scales and minimums have two levels, as GGUF's Q4_K has them (w4k): rounding, damage, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nybble.foreign import open_foreign
from nybble.foreign.choose import choose
from nybble.foreign.fit import fit
from nybble.nn import Linear
from nybble.testing.oracle import random_weight
from nybble.weights.levels import Levels
from nybble.weights.rounding import Ranges, check_portable, dequantize_weight, join_codes, quantize_weight
from nybble.weights.scheme import Scheme

DATA = Path(__file__).parent / "data" / "foreign"


def test_the_weight_is_what_the_formula_says() -> None:
    scheme = Scheme.parse("w4ka16g32")
    quantized = random_weight(scheme, 5, 600)
    codes = scheme.weight_type.unpack(quantized.qweight, 600)
    weight = dequantize_weight(quantized, scheme, 600)
    for n, k in ((0, 0), (1, 31), (2, 255), (3, 256), (4, 599), (2, 544)):
        first, second = (int(quantized.levels[n, k // 32 * 2 + i]) for i in range(2))
        d, dmin = (part[n, k // 256].float() for part in (quantized.scale, quantized.minimum))
        assert weight[n, k] == d * first * int(codes[n, k]) - dmin * second


def test_rounding_is_close_and_settles() -> None:
    scheme = Scheme.parse("w4ka16g32")
    weight = torch.randn(17, 600) * torch.exp2(torch.randint(-12, 3, (17, 1)).float())
    weight[3, :64] = 0
    weight[4] = 0
    weight[5, :32] = 0.25
    quantized = quantize_weight(weight, scheme)
    check_portable(quantized, scheme, 17, 600)
    restored = dequantize_weight(quantized, scheme, 600)
    assert not restored[3, :64].any()
    assert not restored[4].any()
    of_groups = dequantize_weight(
        quantize_weight(weight, Scheme.parse("w4a16g32asym")), Scheme.parse("w4a16g32asym"), 600
    )
    for row in (0, 1, 2, 6, 16):
        error, other = ((found[row] - weight[row]).norm() for found in (restored, of_groups))
        assert error < 1.1 * other
    assert (restored[5, :32] - 0.25).abs().max() < 0.01
    ranges = Ranges.of(quantized, scheme)
    again = join_codes(scheme.weight_type.unpack(quantized.qweight, 600), ranges, scheme)
    assert all(torch.equal(again.tensors()[name], part) for name, part in quantized.tensors().items())
    mse = dequantize_weight(quantize_weight(weight, scheme, "mse"), scheme, 600)
    assert (mse - weight).norm() < (restored - weight).norm()


def test_levels_are_the_nearest() -> None:
    scale, zero = torch.rand(4, 11) + 0.01, torch.rand(4, 11) * 9
    found = Levels.nearest(scale, zero)
    products = found.products
    for got, wanted in ((products[0], scale), (-products[1], scale * zero)):
        for block in (slice(0, 8), slice(8, 11)):
            unit = wanted[:, block].amax(1, keepdim=True) / 63
            assert ((got[:, block] - wanted[:, block]).abs() <= 0.51 * unit + 2e-3 * wanted[:, block]).all()
    # Minimums are what codes of 0 stand for, whatever the scale.
    flat = replace_first(found, 0)
    assert (flat.products[0] == 0).all()
    assert (flat.zeros == 0).all()


def replace_first(levels: Levels, value: int) -> Levels:
    changed = levels.levels.clone()
    changed[:, ::2] = value
    return levels._replace(levels=changed)


def test_damaged_levels_are_refused_by_name() -> None:
    layer = Linear.from_dense(nn.Linear(64, 8), "w4ka8g32")
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"levels: must be in \[0, 63\]"):
        layer.load_state_dict({**state, "levels": state["levels"].index_fill(1, torch.tensor([1]), 64)})
    with pytest.raises(RuntimeError, match=r"levels: \(8, 3\)"):
        layer.load_state_dict({**state, "levels": state["levels"][:, :3]})
    with pytest.raises(RuntimeError, match="scale: must be finite"):
        layer.load_state_dict({**state, "scale": state["scale"] * torch.inf})


def test_q4_k_is_held_as_it_is() -> None:
    (opened,) = open_foreign(DATA / "gguf-q4-k-m")[1].layers.values()
    weight = opened.read()
    for act_bits in (16, 8):
        chosen = choose(weight, act_bits)
        assert (str(chosen.scheme), chosen.why) == (f"w4ka{act_bits}g32", None)
        restored = dequantize_weight(chosen.quantized, chosen.scheme, weight.shape[1])
        assert torch.equal(restored, weight.dequantize())
        assert chosen.quantized.nbytes == weight.shape[0] * weight.shape[1] * 9.25 / 16
    order = torch.randperm(weight.shape[0])
    moved = fit(weight.rows(order))
    assert moved.quantized is not None
    assert torch.equal(dequantize_weight(moved.quantized, moved.scheme, weight.shape[1]), weight.dequantize()[order])
    # What is no Q4_K is held as before.
    assert str(fit(replace(weight, levels=None)).scheme) == "w4a16g32asym"
