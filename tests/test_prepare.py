"""Activations to panels: the codes of every target equal the reference's bit for bit."""

from __future__ import annotations

import pytest
import torch

from nybble import native
from nybble.dispatch import targets
from nybble.dispatch.reference import quantize, quantize_activations
from nybble.dispatch.registry import all_specs
from nybble.dispatch.spec import FLOATS
from nybble.testing.guard import guarded
from nybble.weights.activation_type import ActivationType, activation_types
from nybble.weights.activations import ActScale

SPECS = [spec for spec in all_specs() if spec.op == "prepare"]
FORMATS = {"f32": 0, "s8": 1, "s16": 2, "u8": 3, "bf16": 4, "u7": 5, "s8_pairs": 6}
FORMATS |= {"u8_lines": 7, "s8_lines": 8, "bf16_lines": 9}
LINE_BYTES = 64
# What is added to the codes of a panel of unsigned bytes.
OFFSETS = {"u8": 128, "u8_lines": 128, "u7": 64}
A8, A7 = activation_types()[8], activation_types()[7]
# K, K as it is padded, group
WORD_SHAPES = ((1, 4, 4), (70, 96, 32), (129, 136, 136), (128, 128, 64), (12, 12, 12), (31, 32, 32), (91, 92, 92))
LINE_SHAPES = ((1, 128, 128), (70, 128, 64), (129, 192, 192), (128, 128, 128), (300, 320, 64))


def prepare(spec, x, k_padded, block_rows, group, panel_format, act_type=A8, act=None, order=None):
    """The panel as rows (M, k_padded), scales, zeros and group sums. act: of static activations."""
    m, k = x.shape
    dtype = native.PANEL_DTYPES[panel_format]
    scale, zero = torch.full((m,), 7.0), torch.full((m,), 77, dtype=torch.int32)
    sums = torch.full((m, k_padded // group), 77, dtype=torch.int32)
    unit = LINE_BYTES // dtype.itemsize if panel_format >= FORMATS["u8_lines"] else 4
    lines = -(-k_padded // unit)  # the last line is filled up with zeros
    with guarded((m * lines * unit,), dtype, "right") as panel:
        panel.tensor.view(torch.int8).fill_(77)
        native._C.prepare(
            kernel=spec.name,
            panel_format=panel_format,
            dtype=native.DTYPES[x.dtype],
            x=native.memory(x),
            rows=m,
            stride=x.stride(0),
            k=k,
            k_padded=k_padded,
            block_rows=block_rows,
            group=group,
            panel=native.memory(panel.tensor),
            scale=native.memory(scale),
            zero=native.memory(zero),
            sums=native.memory(sums),
            given_scale=0.0 if act is None else act.scale.item(),
            given_zero=0 if act is None else act.zero_point.item(),
            act_steps=act_type.steps,
            order=native.memory(order),
        )
        assert panel.intact()
        rows = torch.empty(m, lines * unit, dtype=dtype)
        for start in range(0, m, block_rows):
            r = min(block_rows, m - start)
            block = panel.tensor[start * lines * unit : (start + r) * lines * unit]
            if panel_format == FORMATS["s8_pairs"]:
                rows[start : start + r] = rows_of_pairs(block, r)
                continue
            block = block.view(lines, r, unit)
            if dtype in (torch.bfloat16, torch.int16):
                block = block.view(lines, r, -1, 4)[..., (0, 2, 1, 3)]  # the pairs that kernels multiply
            rows[start : start + r] = block.transpose(0, 1).reshape(r, lines * unit)
    return rows, scale, zero, sums


def rows_of_pairs(block: torch.Tensor, r: int) -> torch.Tensor:
    """The (r, k) codes of a row block of a panel of pairs."""
    words = len(block) // (4 * r)
    pairs = block[: words // 2 * 8 * r].view(-1, r, 2, 4)
    rest = block[words // 2 * 8 * r :].view(-1, r, 4)
    stored = [*(pair[:, side] for pair in pairs for side in (0, 1)), *rest]
    whole = words // 4 * 4
    places = [word if word >= whole or word % 4 in (0, 3) else word ^ 3 for word in range(words)]
    return torch.cat([stored[place] for place in places], dim=1)


def makes(spec, panel: str, dtype: torch.dtype) -> bool:
    """Whether the kernel makes such panels: bfloat16 of itself alone, and pairs where a target has kernels that read them."""
    if panel == "s8_pairs":
        return spec.target in ("scalar", "neon")
    return dtype == torch.bfloat16 or not panel.startswith("bf16")


def hard_rows(k: int) -> torch.Tensor:
    """Ties, one-sided ranges, constants, zeros, extremes, NaN, Inf."""
    noise = torch.randn(k)
    ties = (torch.arange(k) % 256 - 128).float() / 2
    rows = [noise, noise.abs(), -noise.abs(), noise + 5, ties, ties + 0.25, torch.zeros(k), torch.full((k,), 0.5)]
    rows += [-torch.zeros(k), noise * 1e30, noise * 3e37, noise * 1e-30, noise * 1e-38, noise * 1e-42]
    bad, infinite = noise.clone(), noise.clone()
    bad[k // 2], infinite[-1] = torch.nan, -torch.inf
    return torch.stack([*rows, bad, infinite, torch.full((k,), torch.finfo(torch.float32).max)])


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("panel", FORMATS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_codes_equal_the_reference(spec, panel: str, dtype: torch.dtype) -> None:
    if spec.target not in targets.detect().targets:
        pytest.skip(f"{spec.name}: {targets.detect().missing[spec.target]}")
    if not makes(spec, panel, dtype):
        with pytest.raises(ValueError, match="does not support panel_format"):
            prepare(spec, hard_rows(12).to(dtype), 12, 4, 12, FORMATS[panel])
        return
    for act_type in (A7,) if panel == "u7" else (A8, A7):
        agree_with_the_reference(spec, panel, dtype, act_type, None)
        for low, high in ((-1.5, 2.0), (0.0, 1e30), (-1e-35, 0.0)):
            agree_with_the_reference(spec, panel, dtype, act_type, ActScale.of_range(low, high, act_type))


def agree_with_the_reference(
    spec, panel: str, dtype: torch.dtype, act_type: ActivationType, act: ActScale | None
) -> None:
    shapes = {"u8_lines": LINE_SHAPES, "s8_lines": LINE_SHAPES + WORD_SHAPES, "bf16_lines": LINE_SHAPES + WORD_SHAPES}
    for k, k_padded, group in shapes.get(panel, WORD_SHAPES):
        x = hard_rows(k).to(dtype)
        for block_rows in (1, 4, 12):
            rows, scale, zero, sums = prepare(spec, x, k_padded, block_rows, group, FORMATS[panel], act_type, act)
            if panel in ("f32", "bf16", "bf16_lines"):
                assert torch.equal(rows[:, :k].float().nan_to_num(1.5), x.float().nan_to_num(1.5))
                assert (rows[:, k:] == 0).all()
                continue
            codes = rows.int() - OFFSETS.get(panel, 0)
            expected = quantize(x, act, act_type)
            assert torch.equal(codes[:, :k], expected.codes.int()), (k, block_rows)
            assert (codes[:, k:] == 0).all(), "padding is code 0"
            assert torch.equal(scale.nan_to_num(-1), expected.scale.nan_to_num(-1))
            assert torch.equal(zero, expected.zero)
            assert torch.equal(sums, codes[:, :k_padded].view(len(x), -1, group).sum(-1))


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("panel", FORMATS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_an_order_gives_the_panel_of_permuted_rows(spec, panel: str, dtype: torch.dtype) -> None:
    if spec.target not in targets.detect().targets or not makes(spec, panel, dtype):
        pytest.skip(f"{spec.name} does not run here, or not with this panel")
    act_type = A7 if panel == "u7" else A8
    for k, k_padded, group in LINE_SHAPES if panel.endswith("lines") else WORD_SHAPES:
        order = torch.randperm(k).int()
        for block_rows, act in ((1, None), (4, None), (12, ActScale.of_range(-1.5, 2.0, act_type))):
            with guarded((18, k), dtype, "right") as x:
                x.tensor.copy_(torch.randn(18, k) * torch.exp2(torch.randint(-9, 9, (18, 1))))
                args = k_padded, block_rows, group, FORMATS[panel], act_type, act
                got = prepare(spec, x.tensor, *args, order)
                expected = prepare(spec, x.tensor[:, order.long()].contiguous(), *args)
            codes = panel not in ("f32", "bf16", "bf16_lines")
            for one, other in zip(got[: None if codes else 1], expected, strict=False):
                assert torch.equal(one, other), (k, block_rows)


def test_orders_beyond_the_row_are_refused() -> None:
    for wrong in (12, -1):
        with pytest.raises(ValueError, match=r"order: must be in \[0, k\)"):
            prepare(SPECS[0], hard_rows(12), 12, 4, 12, FORMATS["s8"], order=torch.full((12,), wrong).int())


@pytest.mark.parametrize(("scale", "zero"), [(-1.0, 0), (2.0**-127, 0), (torch.inf, 0), (1.0, 128), (1.0, -129)])
def test_scales_and_zero_points_out_of_range_are_refused(scale: float, zero: int) -> None:
    act = ActScale(torch.tensor([scale]), torch.tensor([zero]))
    with pytest.raises(ValueError, match=r"act_scale|act_zero_point"):
        prepare(SPECS[0], hard_rows(12), 12, 4, 12, FORMATS["s8"], act=act)


@pytest.mark.parametrize("zero", [64, -65])
def test_zero_points_that_are_no_code_of_seven_bits_are_refused(zero: int) -> None:
    act = ActScale(torch.tensor([1.0]), torch.tensor([zero]))
    with pytest.raises(ValueError, match=r"act_zero_point: must be in \[-64, 63\]"):
        prepare(SPECS[0], hard_rows(12), 12, 4, 12, FORMATS["s8"], A7, act)


def test_codes_that_a_panel_cannot_hold_are_refused() -> None:
    for panel, bits in (("u7", A8), ("s8", activation_types()[16])):
        with pytest.raises(ValueError, match=f"act_steps={bits.steps}: must be 127, or 255 with another panel format"):
            prepare(SPECS[0], hard_rows(12), 12, 4, 12, FORMATS[panel], bits)


@pytest.mark.parametrize(("k_padded", "group"), [(12, 12), (96, 96), (128, 32)])
def test_lines_that_are_not_whole_are_refused(k_padded: int, group: int) -> None:
    with pytest.raises(ValueError, match="k_padded, group: must be multiples of 64"):
        prepare(SPECS[0], hard_rows(12), k_padded, 4, group, FORMATS["u8_lines"])


def test_the_reference_rounds_as_its_docstring_says() -> None:
    x = torch.tensor([[0.0, 51.0, 254.5, 255.0], [-128.0, 127.0, 0.5, -0.5], [1.0, 1.0, 1.0, 1.0]])
    codes, scale, zero = quantize_activations(x, A8)
    assert codes.tolist() == [[-128, -77, 126, 127], [-128, 127, 0, 0], [127, 127, 127, 127]]
    assert scale.tolist() == pytest.approx([1.0, 1.0, 1 / 255])
    assert zero.tolist() == [-128, 0, -128]
    x = torch.tensor([[0.0, 51.0, 126.5, 127.0], [-64.0, 63.0, 0.5, -0.5], [1.0, 1.0, 1.0, 1.0]])
    codes, scale, zero = quantize_activations(x, A7)
    assert codes.tolist() == [[-64, -13, 62, 63], [-64, 63, 0, 0], [63, 63, 63, 63]]
    assert scale.tolist() == pytest.approx([1.0, 1.0, 1 / 127])
    assert zero.tolist() == [-64, 0, -64]


def test_scaling_by_a_power_of_two_changes_only_the_scale() -> None:
    x = torch.randn(8, 200)
    codes, scale, zero = quantize_activations(x, A8)
    for exponent in (-90, -30, 7, 100):
        scaled = quantize_activations(x * 2.0**exponent, A8)
        assert torch.equal(scaled.codes, codes)
        assert torch.equal(scaled.zero, zero)
        assert torch.equal(scaled.scale, scale * 2.0**exponent)


@pytest.mark.parametrize("act_type", [A8, A7], ids=lambda kind: kind.name)
def test_error_is_at_most_half_a_step(act_type: ActivationType) -> None:
    x = torch.randn(64, 300) * torch.rand(64, 1) + torch.rand(64, 1)
    codes, scale, zero = quantize_activations(x, act_type)
    restored = (codes.float() - zero[:, None]) * scale[:, None]
    # The zero point is rounded too, so the far end of the range may be cut by as much again.
    assert ((restored - x).abs() <= 1.001 * scale[:, None]).all()
    assert ((restored - x).abs() <= 0.501 * scale[:, None]).float().mean() > 0.99
