"""Weights to codes: schemes, rounding, the portable layout."""

from __future__ import annotations

import re

import pytest
import torch

from nybble.testing.oracle import random_weight, schemes_of
from nybble.weights.rounding import (
    METHODS,
    QuantizedWeight,
    check_portable,
    dequantize_weight,
    pack_nibbles,
    quantize_weight,
    unpack_nibbles,
)
from nybble.weights.scheme import Scheme, families, grammar, numbers_of
from nybble.weights.weight_type import WeightType, pack_codes, unpack_codes, weight_types

SCHEMES = [scheme for family in ("w8a8", "w4a16") for scheme in schemes_of(family)]
# HQQ is for groups.
PAIRS = [(scheme, method) for scheme in SCHEMES for method in METHODS if method != "hqq" or scheme.group_size]
BY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def per_input(scheme: Scheme, values: torch.Tensor, k: int) -> torch.Tensor:
    return values.float().repeat_interleave(scheme.group_size or k, dim=1)[:, :k]


@pytest.mark.parametrize(
    "name", ["w8a8", "w8a16", "w4a16", "w4a8g32", "w4a16g64", "w4a16g128asym", "w4a8asym", "w8a8g32", "w8a16g16asym"]
)
def test_names_round_trip(name: str) -> None:
    assert str(Scheme.parse(name)) == name
    assert Scheme.parse(Scheme.parse(name)) is Scheme.parse(name) or Scheme.parse(name) == Scheme.parse(name)


@pytest.mark.parametrize("name", ["", "w3a8", "w8a8g96", "w4a16g48", "W8A8", "w16a16asym", "w4a16 ", "int8", "w4a4"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"scheme="):
        Scheme.parse(name)


def test_types_and_fields_are_checked() -> None:
    with pytest.raises(TypeError, match="scheme=8"):
        Scheme.parse(8)  # type: ignore[arg-type]
    for kwargs in (
        {"weight_bits": 3, "act_bits": 8},
        {"weight_bits": 8, "act_bits": 4},
        {"weight_bits": 4, "act_bits": 8, "group_size": 8},
    ):
        with pytest.raises(ValueError, match="must be"):
            Scheme(**kwargs)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("w3a8", "weight_bits=3: must be 8, 4 or 16"),
        ("w8a4", "act_bits=4: must be 7, 8 or 16"),
        ("w4a7", "act_bits=7: must be 8 or 16 with w4"),
        ("sp50w8a7", "sparsity=sp50: must be None with a7"),
        ("bs32x32w8a7", "sparsity=bs32x32: must be None with a7"),
        ("w16a8", "act_bits=8: must be 16 with w16"),
        ("sp50w8a8g128", "group_size=128: must be None with sparse weights of 8 bits"),
        ("w4a16g48", r"group_size=48: must be None or one of \(16, 32, 64, 128\) with w4"),
        ("sp24w8a8asym", r"symmetric=False: sparse weights \(sp24\) must be symmetric"),
        ("sp24w4a16asym", r"symmetric=False: sparse weights \(sp24\) must be symmetric"),
        ("sp50w16a16", "sparsity=sp50: must be sp24 or None with w16"),
        ("bs32x32w8a16", "sparsity=bs32x32: blocks are for w8a8"),
        ("w4a16static", "static=True: .* must be False"),
    ],
)
def test_refusals_name_the_field_its_value_and_the_rule(name: str, rule: str) -> None:
    with pytest.raises(ValueError, match=f"scheme='{name}': not a scheme: {rule}.*; use w8a7, w8a8, w8a16"):
        Scheme.parse(name)


def test_every_name_in_the_grammar_is_one() -> None:
    names = set(re.findall(r"\b(?:sp\w*|bs\w*)?w\d+[b-z]*a\d+\w*", grammar()))
    assert {"w8a7", "w8a8", "w16a16", "w4a16g128", "w4a8g32asym", "w8a8static", "sp50w8a8"} <= names
    assert {str(Scheme.parse(name)) for name in names} == names


def test_families_are_those_of_the_schemes() -> None:
    for family in families():
        kind, act_bits = numbers_of(family)
        assert {scheme.family for scheme in schemes_of(family)} == {family}
        assert all((scheme.weight_type, scheme.act_bits) == (kind, act_bits) for scheme in schemes_of(family))
    for name in ("w9a8", "bsw4a8", "w16a8", "w4a7", "spw8a7", "w4"):
        with pytest.raises(ValueError, match=f"scheme='{name}': must be one of the families w8a7, w8a8, "):
            numbers_of(name)


# --- types of weights: those of nybble, and such as a plug-in may add


TYPES = [
    *weight_types().values(),
    WeightType(2, 0, 3, 2, 3, torch.uint8, per_byte=4, zero_point=torch.uint8),
    WeightType(1, 0, 1, 0, 1, torch.uint8, per_byte=8, zero_point=torch.uint8),
    WeightType(6, -32, 31, 0, 63, torch.int8, scale=torch.float16, zero_point=torch.int8),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", TYPES[len(weight_types()) :], ids=lambda kind: kind.name)
def test_other_types_round_to_half_a_step(kind: WeightType, symmetric: bool) -> None:
    """Also where codes are negative and have zero points, and where one side of the range has a code more."""
    values = torch.randn(50, 40) + torch.linspace(-2, 2, 50)[:, None]
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    if symmetric and kind.middle == kind.lowest:
        pytest.skip("its codes have one sign: a row like this is refused")
    scale, zero = (each[:, None] for each in kind.scales(low, high, symmetric))
    codes = kind.nearest(values, scale, zero)
    assert scale.dtype == kind.scale
    assert kind.lowest <= codes.min() < codes.max() <= kind.highest
    steps = ((codes - zero) * scale.float() - values).abs() / scale.float()
    assert steps.max() <= 1.01 if not symmetric else steps.max() <= 0.51 + 0.01 * kind.highest


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_codes_are_stored_and_checked(kind: WeightType) -> None:
    for k in (1, 7, 16, 33):
        codes = torch.randint(kind.lowest, kind.highest + 1, (5, k))
        stored = kind.pack(codes)
        assert stored.dtype == kind.stored
        assert stored.shape == (5, -(-k // kind.per_byte))
        assert torch.equal(kind.unpack(stored, k).long(), codes)
        kind.check(stored, k)
        if k % kind.per_byte:
            with pytest.raises(ValueError, match="qweight: the bits beyond the last input must be 0"):
                kind.check(stored | 0x80, k)


def test_a_code_out_of_range_is_named() -> None:
    kind = WeightType(3, 0, 5, 3, 5, torch.uint8, per_byte=2)
    assert kind.inconsistent() is None
    with pytest.raises(ValueError, match=r"qweight: code 7 is outside \[0, 5\]"):
        kind.check(kind.pack(torch.tensor([[1, 7]])), 2)


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert pack_codes(torch.tensor([[1, 2, 3, 0, 2]]), 4).tolist() == [[0b00111001, 0b10]]
    assert unpack_codes(torch.tensor([[0b00111001, 0b10]], dtype=torch.uint8), 4, 5).tolist() == [[1, 2, 3, 0, 2]]


@BY_SCHEME
def test_error_is_at_most_half_a_step(scheme: Scheme) -> None:
    weight = torch.randn(20, 300)
    quantized = quantize_weight(weight, scheme)
    check_portable(quantized, scheme, 20, 300)
    scale = per_input(scheme, quantized.scale, 300)
    error = (dequantize_weight(quantized, scheme, 300) - weight).abs()
    # Half a step of rounding; a scale or zero point that was itself rounded moves the ends of the range.
    assert (
        error <= 0.501 * scale + 0.06 * scale * (scheme.weight_bits == 4) + 0.5 * scale * (not scheme.symmetric)
    ).all()


@BY_SCHEME
def test_rounding_again_gives_the_same_codes(scheme: Scheme) -> None:
    for method in [method for asked, method in PAIRS if asked == scheme]:
        quantized = quantize_weight(torch.randn(9, 200), scheme, method)
        restored = dequantize_weight(quantized, scheme, 200)
        again = dequantize_weight(quantize_weight(restored, scheme), scheme, 200)
        step = per_input(scheme, quantized.scale, 200)
        close = (again - restored).abs() <= 0.51 * step
        assert close.all()
        if scheme.weight_bits == 8 and method == "rtn":
            assert torch.equal(quantize_weight(restored, scheme).qweight, quantized.qweight)


@pytest.mark.parametrize(("scheme", "method"), PAIRS, ids=str)
def test_scaling_by_a_power_of_two_changes_only_the_scale(scheme: Scheme, method: str) -> None:
    weight = torch.randn(6, 130)
    base = quantize_weight(weight, scheme, method)
    for exponent in (-60, -7, 3, 60):
        scaled = quantize_weight(weight * 2.0**exponent, scheme, method)
        assert torch.equal(scaled.qweight, base.qweight)
        assert torch.equal(scaled.scale.float(), base.scale.float() * 2.0**exponent)
        assert scheme.symmetric or torch.equal(scaled.zero_point, base.zero_point)


@BY_SCHEME
def test_mse_is_never_worse_in_its_own_norm(scheme: Scheme) -> None:
    weight = torch.distributions.StudentT(3.0).sample((24, 256))
    errors = []
    for method in ("rtn", "mse"):
        difference = (dequantize_weight(quantize_weight(weight, scheme, method), scheme, 256) - weight).abs().pow(2.4)
        errors.append(difference.view(24, -1, scheme.group_size or 256).sum(-1))
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.97 * errors[0].sum() or scheme.weight_bits == 8


def test_eight_bits_are_far_better_than_four() -> None:
    weight = torch.randn(64, 512)
    error = {
        name: float(
            (dequantize_weight(quantize_weight(weight, Scheme.parse(name)), Scheme.parse(name), 512) - weight).norm()
        )
        for name in ("w8a16", "w4a16")
    }
    assert 13 < error["w4a16"] / error["w8a16"] < 21


@pytest.mark.parametrize(("scheme", "method"), PAIRS, ids=str)
def test_zero_constant_and_tiny_groups(scheme: Scheme, method: str) -> None:
    weight = torch.zeros(6, 128)
    weight[1], weight[2], weight[3], weight[4] = 0.5, -0.5, 1e-30, torch.randn(128) * 1e-20
    restored = dequantize_weight(quantize_weight(weight, scheme, method), scheme, 128)
    assert (restored[0] == 0).all()
    assert (restored[5] == 0).all()
    for row in (1, 2, 3):
        assert torch.allclose(restored[row], weight[row], rtol=0.04)
    assert float((restored[4] - weight[4]).norm() / weight[4].norm()) < 0.2


def test_weights_that_cannot_be_rounded_are_refused() -> None:
    scheme = Scheme.parse("w4a16g32")
    for value in (torch.nan, torch.inf):
        weight = torch.randn(4, 32)
        weight[1, 3] = value
        with pytest.raises(ValueError, match="NaN or Inf"):
            quantize_weight(weight, scheme)
    with pytest.raises(ValueError, match="matrix"):
        quantize_weight(torch.randn(4), scheme)
    with pytest.raises(ValueError, match="method='best'"):
        quantize_weight(torch.randn(4, 32), scheme, "best")


def test_nibbles_round_trip() -> None:
    for k in (1, 2, 7, 8, 33):
        codes = torch.randint(0, 16, (5, k), dtype=torch.uint8)
        packed = pack_nibbles(codes)
        assert packed.shape == (5, (k + 1) // 2)
        assert torch.equal(unpack_nibbles(packed, k), codes)
    assert pack_nibbles(torch.tensor([[1, 2, 3]])).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize(
    ("scheme", "name", "change"),
    [
        ("w8a8", "qweight", lambda t: t[:, 1:]),
        ("w8a8", "scale", lambda t: t.double()),
        ("w4a16g32", "scale", lambda t: t.double()),
        ("w8a8", "scale", lambda t: -t),
        ("w4a16g32", "scale", lambda t: t * torch.inf),
        ("w8a8", "scale", lambda t: t * 0),
        ("w4a16g32asym", "scale", lambda t: t * 0),
        ("w4a16g32", "qweight", lambda t: t | 0xF0),
        ("w4a16g32asym", "zero_point", lambda t: t + 16),
        ("w4a16g32asym", "zero_point", lambda t: None),
    ],
)
def test_portable_tensors_are_checked(scheme: str, name: str, change) -> None:
    parsed = Scheme.parse(scheme)
    good = random_weight(parsed, 4, 33)
    check_portable(good, parsed, 4, 33)
    bad = QuantizedWeight(**{**good.tensors(), name: change(getattr(good, name))})
    with pytest.raises(ValueError, match=name):
        check_portable(bad, parsed, 4, 33)


@pytest.mark.parametrize("name", ["w4a16g32", "w4a16g64asym", "w4a16g128asym", "w4a16g128"])
@pytest.mark.parametrize("heavy", [False, True])
def test_hqq_loses_less_in_its_norm_and_no_group_loses_more(name: str, heavy: bool) -> None:
    scheme = Scheme.parse(name)
    weight = torch.distributions.StudentT(3.0).sample((64, 512)) if heavy else torch.randn(64, 512)
    errors = [
        (dequantize_weight(quantize_weight(weight, scheme, method), scheme, 512) - weight).abs()
        for method in ("hqq", "rtn")
    ]
    norms = [error.pow(0.7).view(64, -1, scheme.group_size or 512).sum(-1) for error in errors]
    assert (norms[0] <= norms[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < 0.98 * errors[1].sum()
    assert torch.equal(quantize_weight(weight, scheme, "hqq").qweight, quantize_weight(weight, scheme, "hqq").qweight)


@pytest.mark.parametrize("name", ["w8a8", "w4a16", "w4a16asym"])
def test_hqq_wants_groups(name: str) -> None:
    with pytest.raises(ValueError, match="needs 4-bit weights in groups"):
        quantize_weight(torch.randn(4, 64), Scheme.parse(name), "hqq")
