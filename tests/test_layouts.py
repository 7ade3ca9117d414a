"""Packed layouts: the definition in torch, and the native packing that equals it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble import layouts, native, ops
from nybble.layouts import Layout, portable, quads
from nybble.testing.oracle import random_weight, schemes_of
from nybble.weights.rounding import QuantizedWeight, unpack_nibbles
from nybble.weights.scheme import Scheme

SCHEMES = [scheme for family in ("w8a8", "w4a8") for scheme in schemes_of(family)]
BY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
SHAPES = [(1, 1), (16, 64), (17, 129), (33, 70), (5, 7), (48, 256), (100, 333)]


def layout_of(scheme: Scheme) -> str:
    return layouts_of(scheme)[0]


def layouts_of(scheme: Scheme) -> tuple[str, ...]:
    whole = scheme.group_size is None and scheme.symmetric
    return ("n16k8", "n16k16n") if scheme.weight_bits == 4 else ("n16k4", "n16k16") if whole else ("n16k4g", "n16k16g")


@BY_SCHEME
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_native_packing_equals_the_definition(scheme: Scheme, n: int, k: int) -> None:
    quantized = random_weight(scheme, n, k, seed=n * 1000 + k)
    for layout in layouts_of(scheme):
        packed = layouts.pack(quantized, layout, scheme, k)
        assert torch.equal(native.pack(quantized, scheme, k, layout), packed)
        assert packed.numel() == layouts.packed_nbytes(layout, scheme, n, k)


def test_every_layout_is_complete_and_native_ones_are_on_the_cpu() -> None:
    expected = "plain n16k4 n16k16 n16k4g n16k16g n16k8 n16k16n n16k32 mask8 mask4 gather8 blocks8 rows8 frag4 quads8 quads4 quads16 bsr8"
    assert list(layouts.table()) == expected.split()
    for layout in layouts.table().values():
        assert layout.incomplete() is None
        assert (layout.device == "cpu") == (layout.own_pack is not None and layout.name != "bsr8")
        assert layout.mask in ("", *layouts.table())


@pytest.mark.parametrize(
    "row",
    [
        Layout("x"),
        Layout("x", sections=lambda *shape: {}),
        Layout("x", own_pack=lambda *shape: torch.empty(0)),
        Layout("x", own_pack=lambda *shape: torch.empty(0), collect=lambda *shape: None),
    ],
)
def test_a_row_without_a_way_to_pack_is_incomplete(row: Layout) -> None:
    assert "needs" in (row.incomplete() or "")


def test_an_unknown_layout_is_refused_by_name() -> None:
    quantized, scheme = random_weight(SCHEMES[0], 4, 8), SCHEMES[0]
    for call in (
        lambda: layouts.pack(quantized, "n32", scheme, 8),
        lambda: layouts.packed_nbytes("n32", scheme, 4, 8),
        lambda: ops.pack_as(quantized, "n32", scheme, 8),
        lambda: ops.unpack(torch.empty(64, dtype=torch.uint8), "n32", scheme, 4, 8),
    ):
        with pytest.raises(ValueError, match=r"layout='n32': unknown; must be one of plain, n16k4, .*bsr8$"):
            call()
    with pytest.raises(ValueError, match="layout='bsr8': has no sections of fixed size"):
        layouts.sections("bsr8", Scheme.parse("bs32x32w8a8"), 64, 64)


def test_a_weight_elsewhere_is_not_packed_by_the_compiled_library() -> None:
    """It would read the address as one of the CPU's."""
    quantized = random_weight(SCHEMES[0], 4, 8)
    there = QuantizedWeight(quantized.qweight.to("meta"), quantized.scale.to("meta"))
    with pytest.raises(ValueError, match="weight: is on meta; layout 'n16k4' is packed on cpu"):
        ops.pack_as(there, "n16k4", SCHEMES[0], 8)
    packed = ops.pack_as(quantized, "n16k4", SCHEMES[0], 8).to("meta")
    with pytest.raises(ValueError, match="weight: is on meta"):
        ops.unpack(packed, "n16k4", SCHEMES[0], 4, 8)


@BY_SCHEME
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_unpacking_is_the_exact_inverse(scheme: Scheme, n: int, k: int) -> None:
    quantized = random_weight(scheme, n, k)
    for layout in (layouts.PLAIN, *layouts_of(scheme)):
        packed = layouts.pack(quantized, layout, scheme, k)
        found = [layouts.unpack(packed, layout, scheme, n, k)]
        if layout != layouts.PLAIN:
            found.append(native.unpack(packed, scheme, n, k, layout))
        for restored in found:
            assert restored.tensors().keys() == quantized.tensors().keys()
            for name, tensor in quantized.tensors().items():
                assert torch.equal(getattr(restored, name), tensor), name


def test_a_layout_is_of_so_many_bits() -> None:
    with pytest.raises(ValueError, match=r'layout="n16k8": its weights have 4 bits, not 8'):
        native.weight_shape(Scheme.parse("w8a8"), 8, 64, "n16k8")


def test_where_a_code_lies() -> None:
    """csrc/pack.h in numbers: input 13 of output 18 is in tile 1, lane 2."""
    eight, four = Scheme.parse("w8a8"), Scheme.parse("w4a8g32")
    quantized = random_weight(eight, 20, 32)
    packed = layouts.pack(quantized, "n16k4", eight, 32).view(torch.int8)
    assert packed[1 * (32 * 16) + 3 * 64 + 2 * 4 + 1] == quantized.qweight[18, 13]
    packed = layouts.pack(quantized, "n16k16", eight, 32).view(torch.int8)
    assert packed[1 * (32 * 16) + 128 + 2 * 8 + 4 + 1] == quantized.qweight[18, 13], "word 3: after word 1"
    quantized = random_weight(four, 20, 32)
    byte = layouts.pack(quantized, "n16k8", four, 32)[1 * (32 * 8) + 1 * 64 + 2 * 4 + 1]
    code = (quantized.qweight[18, 6] >> 4) & 15  # input 13: odd, so the high nibble of byte 6
    assert byte >> 4 == code, "input 13 = 8 + 5: the high nibble of byte 1"
    byte = layouts.pack(quantized, "n16k16n", four, 32)[1 * (32 * 8) + 2 * 8 + 4 + 1]
    assert byte >> 4 == code, "the second word of 16 inputs"
    groups = Scheme.parse("w8a8g16asym")
    quantized = random_weight(groups, 20, 32)
    packed = layouts.pack(quantized, "n16k4g", groups, 32)
    assert packed[1 * (32 * 16) + 3 * 64 + 2 * 4 + 1] == quantized.qweight[18, 13].int() + 128
    beside = layouts.pack(quantized, "n16k16g", groups, 32)
    assert beside[1 * (32 * 16) + 128 + 2 * 8 + 4 + 1] == packed[1 * (32 * 16) + 3 * 64 + 2 * 4 + 1], "as in n16k16"
    zero = layouts.views(packed, "n16k4g", groups, 20, 32)["zero_point"]
    assert quantized.zero_point is not None
    assert zero[1, 1, 2] == quantized.zero_point[18, 1].int() + 128


@pytest.mark.parametrize(("codes", "marked"), [((64, 65, 64, 65), 0), ((65, 65, 64, 65), 1), ((-64, -65, -65, -65), 1)])
def test_large_sums_are_marked(codes: tuple[int, ...], marked: int) -> None:
    """Four codes at k and k + 1 of two lines: times 127, the first sum is the largest that fits in 16 bits."""
    scheme = Scheme.parse("w8a8")
    quantized = random_weight(scheme, 20, 84)  # lines 0 to 20: 10 pairs and one line, in two bytes a tile
    quantized.qweight.zero_()
    quantized.qweight[18, [66, 67, 70, 71]] = torch.tensor(codes, dtype=torch.int8)
    packed = layouts.pack(quantized, "n16k4", scheme, 84)
    assert packed[-64:][:4].tolist() == [0, 0, 0, marked], "the first pair of the second byte of tile 1"


@pytest.mark.parametrize(
    ("name", "bits"),
    [("w8a8", 8), ("w8a8g32", 9), ("w8a8g128asym", 8.3125), ("w4a16", 4), ("w4a16g128", 4.125), ("w4a16g32asym", 4.75)],
)
def test_bytes_a_weight(name: str, bits: float) -> None:
    scheme = Scheme.parse(name)
    nbytes = layouts.packed_nbytes(layout_of(scheme), scheme, 4096, 4096)
    assert nbytes * 8 / 4096**2 == pytest.approx(bits, abs=0.03)


def test_padding_adds_nothing() -> None:
    """Padded outputs have scale 0, padded inputs code 0."""
    scheme = Scheme.parse("w8a8")
    packed = layouts.pack(random_weight(scheme, 17, 5), "n16k4", scheme, 5)
    codes = packed[: 2 * 2 * 64].view(torch.int8).view(2, 2, 16, 4)
    assert (codes[1, :, 1:] == 0).all()
    assert (codes[:, 1, :, 1:] == 0).all()
    assert (packed[2 * 2 * 64 :].view(torch.float32)[17:32] == 0).all()


# --- for GPUs


_HELD = [scheme for scheme in SCHEMES if layout_of(scheme) != "n16k4g"]
GPU_SCHEMES = [*_HELD, *map(Scheme.parse, ("sp24w8a16", "sp24w16a16", "sp24w4a16", "sp24w4a16g32", "sp24w4a16g128"))]

BY_GPU_SCHEME = pytest.mark.parametrize("scheme", GPU_SCHEMES, ids=str)


def gpu_layout_of(scheme: Scheme) -> str:
    if scheme.sparsity is not None:
        return f"quads{scheme.weight_bits}"
    return "rows8" if scheme.weight_bits == 8 else "frag4"


@BY_GPU_SCHEME
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (64, 64), (65, 129), (130, 60)])
def test_gpu_layouts_are_inverted_exactly(scheme: Scheme, n: int, k: int) -> None:
    quantized, layout = random_weight(scheme, n, k, seed=n + k), gpu_layout_of(scheme)
    packed = layouts.pack(quantized, layout, scheme, k)
    assert packed.numel() == layouts.packed_nbytes(layout, scheme, n, k)
    restored = layouts.unpack(packed, layout, scheme, n, k)
    assert restored.tensors().keys() == quantized.tensors().keys()
    for name, tensor in quantized.tensors().items():
        assert torch.equal(getattr(restored, name), tensor), name
        assert getattr(restored, name).is_contiguous()


@BY_GPU_SCHEME
def test_where_a_code_lies_on_a_gpu(scheme: Scheme) -> None:
    n, k = 130, 200
    layout = gpu_layout_of(scheme)
    quantized = random_weight(scheme, n, k)
    parts = layouts.views(layouts.pack(quantized, layout, scheme, k), layout, scheme, n, k)
    if layout == "rows8":
        assert parts["codes"].shape == (192, 256)
        assert torch.equal(parts["codes"][:n, :k], quantized.qweight)
        return
    if scheme.sparsity is not None:
        check_quads(scheme, quantized, parts)
        return
    flat = parts["codes"].flatten()
    blocks = parts["codes"].shape[1]
    for row, column in ((0, 0), (1, 1), (9, 2), (71, 7), (129, 199), (100, 130), (63, 63)):
        place = {0: 0, 2: 1, 1: 2, 3: 3}[column % 4]
        g, f = row % 64 // 8, row % 8 // 2
        lane, word = 4 * g + column % 32 // 8, 2 * (column % 64 // 32) + column % 8 // 4
        at = (row // 64 * blocks + column // 64) * 2048 + f * 512 + lane * 16 + word * 4 + place
        code = (quantized.qweight[row, column // 2] >> (4 * (column % 2))) & 15
        assert (flat[at] >> (4 * (row % 2))) & 15 == code, (row, column)
        group = column // (scheme.group_size or k)
        assert parts["scale"][group, row] == quantized.scale[row, group]
        if quantized.zero_point is not None:
            assert parts["zero_point"][group, row] == quantized.zero_point[row, group]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zeros", [0.5, 0.9, 1.0])
def test_places_are_in_order_where_fewer_than_two_of_four_are_left(bits: int, zeros: float) -> None:
    """What mma.sp with ordered metadata asks of every quad, also of one with no weight."""
    zero, dtype = (0, torch.int8) if bits == 8 else (8, torch.uint8)
    codes = (torch.randint(1, 7, (64, 32, 4)).argsort(-1) < 2) * torch.randint(1, 7, (64, 32, 4)) + zero
    codes[torch.rand(64, 32, 4) < zeros] = zero
    whole = codes.flatten(1).to(dtype)
    parts = quads.compress(whole, zero, bits)
    for places in (parts["places"] & 15, parts["places"] >> 4):
        assert (places & 3 < places >> 2).all()
    assert torch.equal(quads.expand(parts["codes"], parts["places"], zero, bits), whole)


@BY_GPU_SCHEME
def test_gpu_padding_is_zero_and_sections_are_aligned(scheme: Scheme) -> None:
    n, k = 70, 33
    layout = gpu_layout_of(scheme)
    packed = layouts.pack(random_weight(scheme, n, k), layout, scheme, k)
    parts = layouts.views(packed, layout, scheme, n, k)
    assert all((view.data_ptr() - packed.data_ptr()) % 64 == 0 for view in parts.values())
    assert (parts["scale"][..., n:] == 0).all()
    dense = layouts.unpack(packed, layout, scheme, 128, k)
    nothing = 8 if layout == "quads4" else 0  # where zeros are left out, what is beyond the edges is left out too
    assert (codes_of(dense, scheme, k)[n:] == nothing).all()
    wide = layouts.padded_in_features(layout, scheme, k)
    assert wide % 64 == 0
    assert wide % (scheme.group_size or 1) == 0
    assert (codes_of(layouts.unpack(packed, layout, scheme, n, wide), scheme, wide)[:, k:] == nothing).all()


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("w8a8", 8),
        ("w4a16", 4),
        ("w4a16g128", 4.125),
        ("w4a16g32asym", 4.75),
        ("sp24w8a16", 5),
        ("sp24w16a16", 9),
        ("sp24w4a16g128", 3.125),
    ],
)
def test_bytes_a_weight_on_a_gpu(name: str, bits: float) -> None:
    scheme = Scheme.parse(name)
    nbytes = layouts.packed_nbytes(gpu_layout_of(scheme), scheme, 4096, 4096)
    assert nbytes * 8 / 4096**2 == pytest.approx(bits, abs=0.02)


def codes_of(quantized: QuantizedWeight, scheme: Scheme, k: int) -> Tensor:
    return unpack_nibbles(quantized.qweight, k) if scheme.weight_bits == 4 else quantized.qweight


def check_quads(scheme: Scheme, quantized: QuantizedWeight, parts: dict[str, Tensor]) -> None:
    """Each code that is kept lies where mma.sp's tables say, see csrc/cuda/maps.h."""
    codes, places = parts["codes"].flatten(), parts["places"].flatten()
    bits, blocks = scheme.weight_bits, parts["places"].shape[1]
    dense = codes_of(quantized, scheme, 200).float() - (8 if bits == 4 else 0)
    for row, quad in ((0, 0), (1, 1), (9, 2), (71, 7), (129, 49), (100, 40), (63, 15), (30, 22)):
        tile = row // 64 * blocks + quad // 16
        g, f, r = row % 64 // 8, row % 8 // 2, row % 2
        h, p, s, u = quad % 16 // 8, quad % 8 // 4, quad % 4 // 2, quad % 2
        byte = places[tile * 512 + (4 * g + 2 * (f % 2) + s) * 16 + 4 * (2 * h + f // 2) + 2 * r + u].item()
        pair = byte >> 4 * p & 15
        assert pair & 3 < pair >> 2
        rebuilt = [0, 0, 0, 0]
        for e, place in enumerate((pair & 3, pair >> 2)):
            lane = 4 * g + 2 * u + p
            if bits == 16:
                at = (tile * 8 + 4 * h + f) * 256 + lane * 8 + 4 * s + 2 * r + e
                rebuilt[place] = codes[at].item()
            elif bits == 8:
                rebuilt[place] = codes[(tile * 4 + f) * 512 + lane * 16 + 8 * h + 4 * r + 2 * s + e].item()
            else:
                rebuilt[place] = (codes[(tile * 2 + h) * 512 + lane * 16 + 4 * f + 2 * e + s].item() >> 4 * r & 15) - 8
        assert rebuilt == dense[row, 4 * quad : 4 * quad + 4].tolist(), (row, quad)


def test_more_than_two_of_four_are_refused() -> None:
    codes = torch.zeros(64, 64, dtype=torch.int8)
    codes[5, 4:7] = 1
    with pytest.raises(ValueError, match="more than two of four"):
        quads.compress(codes, 0, 8)


@pytest.mark.parametrize("name", ["sp50w8a8", "sp24w8a8", "sp50w4a16", "sp24w4a8g32"])
def test_masks_in_torch_equal_the_native_ones(name):
    """What sparse weights of other types use."""
    scheme = Scheme.parse(name)
    for n, k in ((5, 33), (16, 64), (1, 1), (7, 130)):
        qweight = random_weight(scheme, n, k).qweight
        mask, values = portable._to_bitmask(qweight, scheme, k)
        expected = native.to_bitmask(qweight, scheme, k)
        assert torch.equal(mask, expected[0])
        assert torch.equal(values, expected[1])
        assert torch.equal(portable._from_bitmask(mask, values, scheme, n, k), qweight)


@pytest.mark.parametrize("pack", [portable._from_bitmask, native.from_bitmask], ids=["torch", "native"])
def test_masks_that_are_damaged_are_refused_in_torch_too(pack):
    scheme = Scheme.parse("sp24w4a8")
    mask, values = native.to_bitmask(random_weight(scheme, 3, 6).qweight, scheme, 6)
    for change, reason in (
        ((mask | 0x80, values), "mask: "),
        ((mask, values[1:]), "values: "),
        ((mask | 7, torch.cat((values, values))), "mask: |values: "),
        ((mask, values | 0xF0), "values: "),
    ):
        with pytest.raises(ValueError, match=reason):
            pack(*change, scheme, 3, 6)
