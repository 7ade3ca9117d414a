"""Rounding by the compiled library against its definition in weights.rounding: byte for byte, and its error."""

from __future__ import annotations

import math

import pytest
import torch

from nybble import native
from nybble.compiled import rounding
from nybble.testing.guard import guarded
from nybble.weights import rounding as definition
from nybble.weights.rounding import QuantizedWeight, portable_spec
from nybble.weights.scheme import Scheme

SCHEMES = [
    "w8a8",
    "w8a8asym",
    "w4a8",
    "w4a8asym",
    *(f"w{bits}a16g{size}{zero}" for bits in (4, 8) for size in (16, 32, 64, 128) for zero in ("", "asym")),
]
BY_SCHEME = pytest.mark.parametrize("scheme", [Scheme.parse(name) for name in SCHEMES], ids=str)
BY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# One weight; odd; tails of groups; whole groups.
SHAPES = [(1, 1), (3, 5), (17, 130), (9, 257), (4, 256)]


def values(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind) + shape[1])
    normal = torch.randn(shape, generator=generator)
    if kind == "zero rows":
        normal[::2] = 0
    elif kind == "ties":
        normal = torch.randint(-9, 10, shape, generator=generator) * 0.5
    elif kind == "octaves":
        normal *= torch.exp(20 * torch.randn(shape, generator=generator))
    elif kind == "one sign":
        normal = normal.abs()
    elif kind == "other sign":
        normal = -normal.abs()
    elif kind != "normal":
        normal *= float(kind)
    return normal


KINDS = ["normal", "zero rows", "ties", "octaves", "one sign", "other sign", "1e-5", "1e-38", "1e-41", "1e38"]


def equal(found: QuantizedWeight, expected: QuantizedWeight) -> bool:
    """Whether all tensors are, in every bit: 0 and -0 differ."""
    ours, theirs = found.tensors(), expected.tensors()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in theirs.items()
    )


def sqnr(weight: torch.Tensor, rounded: QuantizedWeight, scheme: Scheme) -> float:
    stored = definition.dequantize_weight(rounded, scheme, weight.shape[1]).to(weight.dtype).double()
    signal, noise = weight.double().square().sum().item(), (weight.double() - stored).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and noise < math.inf else -math.inf


@pytest.mark.sampled(every=3)
@BY_DTYPE
@BY_SCHEME
@pytest.mark.parametrize("kind", KINDS)
def test_codes_scales_and_error_equal_the_definition(scheme: Scheme, kind: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max / 4
    for shape in SHAPES:
        weight = values(kind, shape).clamp(-largest, largest).to(dtype)
        found = rounding.quantize_weight(weight, scheme)
        assert equal(found, definition.quantize_weight(weight, scheme)), shape
        assert rounding.sqnr_db(weight, found, scheme) == pytest.approx(sqnr(weight, found, scheme), abs=1e-6), shape


@BY_SCHEME
@pytest.mark.parametrize("shape", [(130, 1024), (3, 65_537)], ids=["pieces of many rows", "rows longer than a piece"])
def test_many_pieces_of_work(scheme: Scheme, shape: tuple[int, int]) -> None:
    weight = values("normal", shape)
    found = rounding.quantize_weight(weight, scheme)
    assert equal(found, definition.quantize_weight(weight, scheme))
    assert rounding.sqnr_db(weight, found, scheme) == pytest.approx(sqnr(weight, found, scheme), abs=1e-6)


@BY_SCHEME
def test_every_float16_is_widened_and_rounded_as_torch_does(scheme: Scheme) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    weight = bits[torch.isfinite(bits)].view(-1, 32)
    found = rounding.quantize_weight(weight, scheme)
    assert equal(found, definition.quantize_weight(weight, scheme))
    assert rounding.sqnr_db(weight, found, scheme) == pytest.approx(sqnr(weight, found, scheme), abs=1e-6)


@BY_DTYPE
@pytest.mark.parametrize("name", ["w8a8", "w4a16g32asym"])
@pytest.mark.parametrize(
    ("view", "is_copied"),
    [
        (lambda weight: weight.t().contiguous().t(), True),
        (lambda weight: weight.repeat_interleave(2, 0)[::2], False),
        (lambda weight: weight.repeat_interleave(2, 1)[:, ::2], True),
        (lambda weight: weight[:1].expand(40, -1), True),
        (lambda weight: torch._neg_view(-weight), True),
    ],
    ids=["transposed", "every other row", "every other input", "one row", "negated lazily"],
)
def test_strides(view, is_copied: bool, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(rounding, "_CHUNK", 1000)  # so that copies are made in several parts
    scheme, weight = Scheme.parse(name), view(values("normal", (40, 130)).to(dtype))
    found = rounding.quantize_weight(weight, scheme)
    assert equal(found, definition.quantize_weight(weight.contiguous(), scheme))
    assert rounding.sqnr_db(weight, found, scheme) == pytest.approx(sqnr(weight, found, scheme), abs=1e-6)
    assert rounding.all_finite(weight)
    assert (weight.stride(1) != 1 or weight.stride(0) == 0 or weight.is_neg()) is is_copied


@BY_DTYPE
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_found_wherever_they_stand(bad: float, dtype: torch.dtype) -> None:
    for at in ((0, 0), (4, 129), (4, 64), (2, 1)):
        weight = values("normal", (5, 130)).to(dtype)
        assert rounding.all_finite(weight)
        assert rounding.all_finite(weight.t())
        weight[at] = bad
        assert not rounding.all_finite(weight)
        assert not rounding.all_finite(weight.t())
        for name in SCHEMES:
            with pytest.raises(ValueError, match="weight: has NaN or Inf"):
                rounding.quantize_weight(weight, Scheme.parse(name))


@pytest.mark.parametrize("name", ["w8a8", "w4a8g32asym"])
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    scheme, weight, threads = Scheme.parse(name), values("normal", (300, 700)), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((rounding.quantize_weight(weight, scheme), count))
            assert rounding.sqnr_db(weight, results[0][0], scheme) == rounding.sqnr_db(weight, results[-1][0], scheme)
    finally:
        torch.set_num_threads(threads)
    assert all(equal(found, results[0][0]) for found, _ in results)


@pytest.mark.parametrize("name", ["sp24w16a16", "w8a8"])
def test_other_dtypes_and_types_of_weights_take_the_definition(name: str) -> None:
    scheme, weight = Scheme.parse(name), values("normal", (16, 64)).double()
    weight[:, ::2] = 0
    found = rounding.quantize_weight(weight, scheme)
    assert equal(found, definition.quantize_weight(weight, scheme))
    assert rounding.sqnr_db(weight, found, scheme) == pytest.approx(sqnr(weight, found, scheme), abs=1e-6)


def test_errors_are_those_of_the_definition() -> None:
    for weight, scheme, method in (
        (torch.zeros(3), "w8a8", "rtn"),
        (torch.zeros(3, 4, dtype=torch.int32), "w8a8", "rtn"),
        (torch.zeros(3, 4), "w8a8", "best"),
        (torch.zeros(3, 4), "w8a8", "hqq"),
        (torch.zeros(1, 65_794), "w8a8", "rtn"),
    ):
        with pytest.raises(ValueError, match=r"^(weight|method|in_features)") as expected:
            definition.quantize_weight(weight, Scheme.parse(scheme), method)
        with pytest.raises(ValueError) as found:  # noqa: PT011
            rounding.quantize_weight(weight, Scheme.parse(scheme), method)
        assert str(found.value) == str(expected.value)


def test_exact_zero_and_overflowing_weights() -> None:
    scheme = Scheme.parse("w8a8")
    exact = torch.tensor([[127.0, -3.0, 0.0]])
    assert rounding.sqnr_db(exact, rounding.quantize_weight(exact, scheme), scheme) == math.inf
    zero = torch.zeros(2, 3)
    assert rounding.sqnr_db(zero, rounding.quantize_weight(zero, scheme), scheme) == math.inf
    assert rounding.sqnr_db(zero, rounding.quantize_weight(exact.expand(2, 3), scheme), scheme) == -math.inf
    largest, scheme = torch.full((1, 32), -65504.0).half(), Scheme.parse("w4a16g32")
    assert rounding.sqnr_db(largest, rounding.quantize_weight(largest, scheme), scheme) == -math.inf


@BY_DTYPE
@BY_SCHEME
def test_memory_beside_the_buffers_is_not_touched(scheme: Scheme, dtype: torch.dtype) -> None:
    for n, k in ((1, 1), (5, 33), (3, 130), (2, 256)):
        spec = portable_spec(scheme, n, k)
        for flush in ("left", "right"):
            with (
                guarded((n, k), dtype, flush) as weight,
                guarded(*spec["qweight"], flush) as qweight,
                guarded(*spec["scale"], flush) as scale,
                guarded(*spec.get("zero_point", ((1,), torch.uint8)), flush) as zero,
            ):
                weight.tensor.copy_(values("normal", (n, k)))
                to = QuantizedWeight(qweight.tensor, scale.tensor, None if scheme.symmetric else zero.tensor)
                assert native.round_weight(weight.tensor, scheme, to)
                assert equal(to, definition.quantize_weight(weight.tensor.clone(), scheme))
                assert native.squared_sums(weight.tensor, to, scheme)[0] > 0
                assert native.all_finite(weight.tensor)
                assert all(buffer.intact() for buffer in (weight, qweight, scale, zero))


def test_spans_that_are_too_small_are_refused() -> None:
    scheme, weight = Scheme.parse("w8a8"), torch.randn(4, 8)
    to = rounding.quantize_weight(weight, scheme)
    for short in (QuantizedWeight(to.qweight[:3], to.scale), QuantizedWeight(to.qweight, to.scale[:3])):
        with pytest.raises(ValueError, match=r"has \d+ bytes, needs"):
            native.round_weight(weight, scheme, short)
        with pytest.raises(ValueError, match=r"has \d+ bytes, needs"):
            native.squared_sums(weight, short, scheme)
    for stride in (7, -8):
        with pytest.raises(ValueError, match=f"stride={stride}"):
            native._C.all_finite(native.memory(weight), native._C.F32, 4, 8, stride, 1)
    with pytest.raises(ValueError, match="weight: has"):
        native._C.all_finite(native.memory(weight), native._C.F32, 5, 8, 8, 1)
    with pytest.raises(ValueError, match="dtype"):
        native._C.all_finite(native.memory(weight), native._C.S32, 4, 8, 8, 1)
