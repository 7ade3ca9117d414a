"""Convolutions and pools of codes: that they are those of the floats, products that are added, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import nybble
from nybble import conv
from nybble.bound_conv import BoundConv, BoundPool
from nybble.conv import Epilogue, Geometry
from nybble.dispatch import selection, targets
from nybble.fusion.image_codes import Codes

HERE = targets.detect().targets
RANGE = (-2.0, 6.0)
SIZE = (9, 17)  # widths that are no multiple of a segment


def bound(dense, shape, *epilogue):
    module = nybble.nn.Conv2d.from_dense(dense, "w8a8static", act_range=RANGE)
    module.pack()
    parts = (module.packed, module.bias, "w8a8static", module.layout, dense.out_channels, module._geometry)
    found = BoundConv(*parts, torch.Size(shape), torch.float32, Epilogue(None, *epilogue), None)
    if not found.writes_codes:
        pytest.skip("the kernels here read no codes")
    return found


def last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def frame_of(codes, shape, seed=None):
    """A frame of codes, with random ones in the image if there is a seed."""
    frame = torch.full((codes.nbytes(shape),), 128 + codes.zero, dtype=torch.uint8)
    if seed is not None:
        size, (top, left) = codes.frame(shape), codes.pad
        inner = frame[: torch.Size(size).numel()].view(size)[:, top : size[1] - top, left : size[2] - left]
        inner.copy_(torch.randint(0, 256, inner.shape, generator=torch.Generator().manual_seed(seed)))
    return frame


def assert_codes_of(frame, codes, floats):
    """The codes are the nearest to the values; where two are as near, up to the rounding of float32, either."""
    shape = floats.shape
    ideal = (floats.double() / codes.scale).clamp(-128 - codes.zero, 127 - codes.zero)
    off = (codes.read(frame, shape).double() / codes.scale - ideal).abs()
    assert float(off.max()) <= 0.5 + 1e-3
    size, (top, left) = codes.frame(shape), codes.pad
    whole = frame[: torch.Size(size).numel()].view(size).clone()
    whole[:, top : size[1] - top, left : size[2] - left] = 128 + codes.zero
    assert bool((whole == 128 + codes.zero).all())  # the padding is as it was


@pytest.mark.parametrize("zero", [-128, -37, 90])
@pytest.mark.parametrize(("act", "most"), [("", float("inf")), ("relu", float("inf")), ("relu", 1.0), ("silu", 3.0)])
@pytest.mark.parametrize("added", ["nothing", "codes", "float32", "bfloat16"])
@pytest.mark.parametrize(("kernel", "outputs"), [(1, 48), (3, 64), (3, 24)])
def test_outputs_are_the_codes_of_floats(kernel, outputs, added, act, most, zero):
    torch.manual_seed(0)
    x = last(torch.randn(2, 32, *SIZE))
    one = bound(nn.Conv2d(32, outputs, kernel, padding=kernel // 2), x.shape, act, most)
    shape = torch.Size((2, outputs, *SIZE))
    codes, of_added = Codes(0.021, zero, (1, 2)), Codes(0.013, 5, (0, 1))
    floats, ranges = last(torch.empty(shape)), torch.empty(2, 3)
    residual, native = None, None
    if added == "codes":
        residual, native = frame_of(of_added, shape, 1), of_added.native
        values = last(of_added.read(residual, shape))
    elif added != "nothing":
        residual = last(torch.randn(shape).to(getattr(torch, added)))
        values = last(residual.float())
    one(x, floats, None if residual is None else values, (None, None))
    frame = frame_of(codes, shape)
    one(x, frame, residual, (None, ranges), (None, codes.native, native))
    assert_codes_of(frame, codes, floats)
    assert ranges[:, 2].tolist() == [0, 0]
    if added in ("float32", "bfloat16") and most == float("inf"):
        residual[1, 0, 0, 0] = float("inf")
        one(x, frame, residual, (None, ranges), (None, codes.native, None))
        assert ranges[:, 2].tolist() == [0, 1]
    x[0, 0, 0, 0] = float("nan")
    one(x, frame, residual, (None, ranges), (None, codes.native, native))
    assert ranges[0, 2] == 1


@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (3, 64)])
def test_codes_are_read_as_their_values(kernel, groups):
    torch.manual_seed(0)
    shape = torch.Size((2, 64, *SIZE))
    one = bound(nn.Conv2d(64, 64, kernel, padding=kernel // 2, groups=groups), shape)
    codes = Codes(*one.given, (2, 1))
    frame, ranges = frame_of(codes, shape, 1), torch.zeros(2, 3)
    values = last(codes.read(frame, shape))
    expected, found = last(torch.empty(shape)), last(torch.empty(shape))
    one(values, expected, None, (None, None))
    one(frame, found, None, (ranges, None), (codes.native, None, None))
    assert torch.equal(found, expected)
    # Codes of another scale stand for other values: the product is theirs.
    other = Codes(codes.scale * 2, codes.zero, codes.pad)
    one(frame, found, None, (ranges, None), (other.native, None, None))
    bias = one.bias.view(1, -1, 1, 1)
    assert torch.allclose(found - bias, 2 * (expected - bias), rtol=1e-4, atol=1e-4)
    ranges[1, 2] = 1
    one(frame, found, None, (ranges, None), (codes.native, None, None))
    assert found[1].isnan().all()
    assert found[0].isfinite().all()


@pytest.fixture
def target(machine):
    """target("avx512vnni"): convolutions that are bound from now on have its kernels, if this machine has them."""

    def become(name):
        if name not in HERE:
            pytest.skip(f"no {name} here")
        machine(name)
        selection.compiled_plan.cache_clear()
        conv.kernel_name.cache_clear()

    yield become
    selection.compiled_plan.cache_clear()
    conv.kernel_name.cache_clear()


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stride", "groups"),
    [
        (64, 96, 1, 1, 1),
        (160, 40, 1, 2, 1),
        (20, 64, 3, 1, 1),
        (32, 64, 3, 2, 1),
        (80, 80, 3, 1, 80),
        (96, 96, 5, 2, 96),
    ],
)
def test_targets_write_the_same_codes(target, channels, outputs, kernel, stride, groups, added):
    frames = []
    for name in ("avx512vnni", "amx"):
        target(name)
        torch.manual_seed(0)
        shape = torch.Size((2, channels, *SIZE))
        dense = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, groups=groups)
        one = bound(dense, shape, "relu")
        assert conv.kernel_name() == f"conv_{name}"
        out = torch.Size((2, outputs, *dense(torch.zeros(shape)).shape[2:]))
        of_x, of_y, of_added = Codes(*one.given, (2, 2)), Codes(0.021, -128, (1, 2)), Codes(0.013, 5, (0, 1))
        frame, ranges = frame_of(of_y, out), torch.zeros(2, 3)
        residual, native = (frame_of(of_added, out, 1), of_added.native) if added else (None, None)
        one(frame_of(of_x, shape, 2), frame, residual, (ranges, ranges), (of_x.native, of_y.native, native))
        frames.append(frame)
    assert torch.equal(*frames)
    assert len(frames[0].unique()) > 50


@pytest.mark.parametrize("act", ["", "relu"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_product_is_added_in_the_same_call(batch, act):
    torch.manual_seed(0)
    shape = torch.Size((batch, 32, *SIZE))
    wide = torch.Size((batch, 16, 2 * SIZE[0], 2 * SIZE[1]))
    one = bound(nn.Conv2d(64, 32, 1), (batch, 64, *SIZE), act)
    more = bound(nn.Conv2d(16, 32, 3, 2, 1), wide)
    of_x, of_more, of_y = Codes(*one.given, (0, 0)), Codes(*more.given, (1, 1)), Codes(0.03, -20, (1, 0))
    x, x_more = frame_of(of_x, torch.Size((batch, 64, *SIZE)), 1), frame_of(of_more, wide, 2)
    ranges = [torch.zeros(batch, 3) for _ in range(3)]
    added, floats = last(torch.empty(shape)), last(torch.empty(shape))
    more(x_more, added, None, (ranges[1], None), (of_more.native, None, None))
    one(x, floats, added, (ranges[0], None), (of_x.native, None, None))
    frame = frame_of(of_y, shape)

    def run():
        call = one.call(x, frame, None, (ranges[0], ranges[2]), (of_x.native, of_y.native, None))
        call.add(more.call(x_more, frame, None, (ranges[1], ranges[2]), (of_more.native, of_y.native, None)))
        nybble.native.run_convs([call, call])

    run()
    assert_codes_of(frame, of_y, floats)
    assert ranges[2][:, 2].tolist() == [0] * batch
    ranges[1][0, 2] = 1
    run()
    assert ranges[2][:, 2].tolist() == [1] + [0] * (batch - 1)


def test_products_that_cannot_be_added_are_refused():
    shape = torch.Size((1, 48, *SIZE))
    one = bound(nn.Conv2d(48, 48, 1), shape)
    codes = Codes(*one.given, (0, 0))
    frame, other, ranges = frame_of(codes, shape), frame_of(codes, shape), torch.zeros(1, 3)
    native = (codes.native, codes.native, None)
    call = one.call(frame, other, None, (ranges, ranges), native)
    with pytest.raises(ValueError, match="more: is added only"):
        call.add(one.call(frame, other, None, (ranges, ranges), native))
    with pytest.raises(ValueError, match="more: must have the outputs"):
        call.add(one.call(frame, frame_of(codes, shape), None, (ranges, ranges), native))


def test_codes_are_refused():
    shape = torch.Size((1, 64, 30, 30))
    one = bound(nn.Conv2d(64, 33, 3, padding=1), shape)
    codes = Codes(*one.given, (1, 1))
    frame = torch.zeros(codes.nbytes(shape), dtype=torch.uint8)
    out = last(torch.empty(1, 33, 30, 30))
    one(frame, out, None, (None, None), (codes.native, None, None))
    for wrong, what in (
        ((codes.scale, codes.zero, 0, 1), "out of range"),
        ((codes.scale, 300, 1, 1), "out of range"),
        ((codes.scale, codes.zero, 2, 2), "x: has"),
    ):
        with pytest.raises(ValueError, match=what):
            one(frame, out, None, (None, None), (wrong, None, None))
    with pytest.raises(ValueError, match="y_range"):
        one(frame, frame, None, (None, None), (codes.native, codes.native, None))


@pytest.mark.parametrize("channels", [3, 64, 70])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_pools_of_codes(kernel, stride, padding, channels):
    shape = torch.Size((2, channels, *SIZE))
    of_x, of_y = Codes(0.02, -7, (0, 1)), Codes(0.02, -7, (2, 1))
    x, ranges = frame_of(of_x, shape, 1), [torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), torch.empty(2, 3)]
    wanted = functional.max_pool2d(of_x.read(x, shape), kernel, stride, padding)
    y = frame_of(of_y, wanted.shape)
    pool = BoundPool("max", Geometry(*((one, one) for one in (kernel, stride, padding, 1)), 1), shape)
    pool(x, y, None, tuple(ranges), (of_x.native, of_y.native, None))
    assert torch.equal(of_y.read(y, wanted.shape), wanted)
    assert_codes_of(y, of_y, wanted)
    assert ranges[1].tolist() == [[0, 0, 0], [0, 0, 1]]  # what is bad of x
    for other in (Codes(0.03, -7, (2, 1)).native, Codes(0.02, -6, (2, 1)).native, None):
        with pytest.raises(ValueError, match="codes"):
            pool(x, y, None, tuple(ranges), (of_x.native, other, None))
    with pytest.raises(ValueError, match="ranges"):
        pool(x, y, None, (None, None), (of_x.native, of_y.native, None))
    with pytest.raises(ValueError, match="x: has"):
        pool(x[:-100], y, None, tuple(ranges), (of_x.native, of_y.native, None))
