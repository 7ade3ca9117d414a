"""Convolutions: their integer parts bit for bit on every kernel, their floats against torch, and the op's promises."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import nybble
from nybble import conv as conv_op
from nybble import native, ops
from nybble.bound_conv import BoundConv, BoundPool
from nybble.conv import Epilogue, Geometry
from nybble.dispatch import registry, targets
from nybble.dispatch.reference import quantize
from nybble.native.weights import GROUPED
from nybble.weights.activations import ActScale
from nybble.weights.rounding import quantize_weight
from nybble.weights.scheme import Scheme


@dataclasses.dataclass
class Case:
    batch: int
    channels: int
    size: tuple
    out: int
    kernel: tuple
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    groups: int = 1

    @property
    def geometry(self):
        dims = len(self.size)
        return Geometry(self.kernel, self.stride[:dims], self.padding[:dims], self.dilation[:dims], self.groups)

    @property
    def k(self):
        return self.channels // self.groups * torch.Size(self.kernel).numel()


CASES = {
    "1x1": Case(1, 32, (9, 7), 48, (1, 1)),
    "1x1 many rows": Case(2, 64, (20, 20), 64, (1, 1)),
    "1x1 stride 2": Case(2, 16, (8, 9), 20, (1, 1), (2, 2)),
    "3x3": Case(2, 16, (8, 8), 16, (3, 3), padding=(1, 1)),
    "3x3 wide": Case(1, 64, (30, 30), 33, (3, 3), padding=(1, 1)),
    "7x7 stride 2": Case(1, 3, (23, 21), 64, (7, 7), (2, 2), (3, 3)),
    "dilation": Case(1, 17, (11, 10), 5, (3, 2), padding=(2, 2), dilation=(2, 3)),
    "odd channels": Case(3, 3, (5, 4), 17, (2, 3)),
    "one pixel": Case(2, 5, (1, 1), 3, (1, 1)),
    "kernel over the padding": Case(1, 4, (2, 1), 6, (5, 5), padding=(2, 2)),
    "cut off": Case(1, 8, (9, 9), 16, (2, 2), (4, 4)),
    "groups": Case(2, 24, (6, 5), 36, (3, 3), padding=(1, 1), groups=3),
    "groups of tiles": Case(1, 64, (7, 7), 64, (3, 3), padding=(1, 1), groups=4),
    "depthwise": Case(2, 19, (7, 6), 19, (3, 3), padding=(1, 1), groups=19),
    "depthwise stride 2": Case(1, 32, (9, 20), 32, (3, 3), (2, 2), (1, 1), groups=32),
    "depthwise multiplied": Case(1, 6, (5, 5), 12, (3, 3), groups=6),
    "depthwise wide": Case(2, 83, (8, 15), 83, (3, 3), padding=(1, 1), groups=83),
    "depthwise 5x5": Case(1, 130, (7, 18), 130, (5, 5), (1, 2), (2, 2), groups=130),
    "3x3 stride 2": Case(2, 20, (17, 33), 72, (3, 3), (2, 2), (1, 1)),
    "dilation of runs": Case(1, 8, (14, 16), 33, (3, 3), padding=(2, 2), dilation=(2, 2)),
    "few rows, many columns": Case(1, 96, (4, 4), 520, (3, 3), padding=(1, 1)),
    "steps of a run": Case(1, 160, (5, 9), 48, (1, 1)),
    "lines of segments": Case(2, 24, (5, 41), 40, (3, 3), padding=(1, 1)),
    "depthwise dilated": Case(1, 70, (12, 19), 70, (7, 2), (1, 2), (3, 1), (1, 3), groups=70),
    "1-D": Case(2, 12, (31,), 20, (5,), (2,), (2,), (1,)),
    "1-D dilation": Case(1, 7, (40,), 9, (3,), padding=(4,), dilation=(4,)),
}


def able(family, dtype=torch.float32):
    here = targets.detect().targets
    return [
        spec
        for spec in registry.specs()
        if spec.scheme == family and spec.device == "cpu" and spec.built and spec.target in here
        if spec.make is not None
        and dtype in spec.act_dtypes
        and not spec.layout.startswith(("mask", "gather", "blocks", *GROUPED))
    ]


def made(case, scheme, seed=0):
    g = torch.Generator().manual_seed(seed)
    parsed = Scheme.parse(scheme)
    x = torch.randn(case.batch, case.channels, *case.size, generator=g) * 3 + 0.7
    quantized = quantize_weight(torch.randn(case.out, case.k, generator=g), parsed, "rtn")
    return x, quantized, torch.randn(case.out, generator=g), parsed


def last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def run_kernel(case, spec, helper, x, packed, bias, parsed, out_dtype, formats=(False, False), **more):
    plan = spec.make(parsed, case.out, case.k)
    size = case.geometry.out_size(case.size)
    out = torch.empty(case.batch, case.out, *size, dtype=out_dtype)
    x_last, y_last = formats
    x, out = (last(t) if is_last else t for t, is_last in zip((x, out), formats, strict=True))
    sizes = conv_op.sizes_of(case.batch, x.shape, size, case.geometry)
    if "residual" in more and y_last:
        more["residual"] = last(more["residual"])
    native.run_convs([native.conv_call(plan, helper, sizes, (x, x_last), packed, bias, (out, y_last), **more)])
    return out


def sums(case, x, quantized, act, parsed):
    """The sums of products of codes (not centred), int32, in float64 arithmetic."""
    codes, _, zero = quantize(x.reshape(case.batch, -1), act, parsed.act_type)
    weight = quantized.qweight.double().view(case.out, *case.kernel, -1).movedim(-1, 1)
    centred = (codes.double() - zero.double()[:, None]).view(x.shape)
    found = conv_op._dense_conv(centred, weight, case.geometry)
    totals = weight.flatten(1).sum(1).view(-1, *[1] * len(case.size))
    return (found + zero.double().view(-1, 1, *[1] * len(case.size)) * totals).to(torch.int32)


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["w8a8", "w8a7"])
def test_sums_are_exact(name, family):
    case = CASES[name]
    x, quantized, _, parsed = made(case, family)
    expected = sums(case, x, quantized, None, parsed)
    for spec, helper in itertools.product(able(family), registry.compiled("conv")):
        packed = ops.pack_as(quantized, spec.layout, parsed, case.k)
        for formats in itertools.product([False, True], repeat=2):
            found = run_kernel(case, spec, helper, x, packed, None, parsed, torch.int32, formats)
            assert torch.equal(found, expected), (spec.name, helper, formats)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8g32", "w4a8"])
def test_every_kernel_gives_the_same_bits(name, scheme):
    case = CASES[name]
    x, quantized, bias, parsed = made(case, scheme)
    residual = torch.randn(case.batch, case.out, *case.geometry.out_size(case.size))
    seen = []
    for spec, helper in itertools.product(able(parsed.family), registry.compiled("conv")):
        packed = ops.pack_as(quantized, spec.layout, parsed, case.k)
        for more in ({}, {"residual": residual, "act": "relu", "most": 6.0}):
            for formats in itertools.product([False, True], repeat=2):
                found = run_kernel(case, spec, helper, x, packed, bias, parsed, torch.float32, formats, **more)
                seen.append((bool(more), spec.name, helper, formats, found))
    for extra in (False, True):
        same = [one for one in seen if one[0] is extra]
        for one in same:
            assert torch.equal(one[-1], same[0][-1]), one[:-1]
    epilogues = (Epilogue(), Epilogue(residual, "relu", 6.0))
    packed = ops.pack_as(quantized, same[0] and able(parsed.family)[0].layout, parsed, case.k)
    layout = able(parsed.family)[0].layout
    for extra, epilogue in enumerate(epilogues):
        found = next(one[-1] for one in seen if one[0] is bool(extra))
        expected = conv_op._reference(x, packed, bias, scheme, layout, case.out, case.geometry, epilogue)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-5


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("scheme", "dtype"), [("w8a16", torch.float32), ("w4a16g32", torch.float32), ("w8a16", torch.bfloat16)]
)
def test_float_activations(name, scheme, dtype):
    case = CASES[name]
    x, quantized, bias, parsed = made(case, scheme)
    x = x.to(dtype)
    for spec, helper in itertools.product(able(parsed.family, dtype), registry.compiled("conv")):
        packed = ops.pack_as(quantized, spec.layout, parsed, case.k)
        expected = conv_op._reference(x, packed, bias, scheme, spec.layout, case.out, case.geometry, Epilogue()).float()
        for formats in itertools.product([False, True], repeat=2):
            found = run_kernel(case, spec, helper, x, packed, bias, parsed, dtype, formats).float()
            error = (found - expected).abs().max() / expected.abs().max()
            assert error <= (2e-6 if dtype is torch.float32 else 8e-3), (spec.name, helper, formats)


def dense_of(case, bias=True, **more):
    torch.manual_seed(3)
    cls = nn.Conv1d if len(case.size) == 1 else nn.Conv2d
    parts = case.geometry._asdict() | more
    return cls(case.channels, case.out, bias=bias, **parts).eval()


def module_of(dense, scheme="w8a8", **more):
    return getattr(nybble.nn, type(dense).__name__).from_dense(dense, scheme, **more)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_module_is_close_to_the_dense_one(name, dtype):
    case = CASES[name]
    dense = dense_of(case).to(dtype)
    x = torch.randn(case.batch, case.channels, *case.size, generator=torch.Generator().manual_seed(1)).to(dtype)
    module = module_of(dense)
    with torch.no_grad():
        expected, found = dense(x), module(x)
        rounded = module.dequantize()(x)
    assert found.dtype is dtype
    assert found.shape == expected.shape
    assert found.stride() == expected.stride()
    assert (found - expected).float().norm() <= 0.03 * expected.float().norm()
    assert (rounded - expected).float().norm() <= 0.03 * expected.float().norm()


def test_static_activations():
    case = CASES["3x3"]
    dense = dense_of(case)
    x = torch.randn(case.batch, case.channels, *case.size)
    module = module_of(dense, "w8a8static", act_range=(-2.0, 2.5))
    parsed = Scheme.parse("w8a8static")
    act = ActScale.of_range(-2.0, 2.5, parsed.act_type)
    codes, scale, zero = quantize(x.reshape(case.batch, -1), act, parsed.act_type)
    rounded = ((codes - zero[:, None]) * scale[:, None]).view(x.shape)
    with torch.no_grad():
        assert torch.allclose(module(x), module.dequantize()(rounded), atol=1e-4)


def test_bad_values_reach_only_their_sample():
    case = CASES["3x3"]
    module = module_of(dense_of(case))
    x = torch.randn(3, case.channels, *case.size)
    clean = module(x)
    x[1, 2, 3, 4] = float("inf")
    found = module(x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    x[1] = 0
    assert torch.equal(module(x)[1], module.bias.view(-1, 1, 1).expand_as(clean[1]))


@pytest.mark.parametrize("name", CASES)
def test_threads_change_no_bit(name):
    case = CASES[name]
    module = module_of(dense_of(case))
    x = torch.randn(case.batch, case.channels, *case.size)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(module(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["1x1", "3x3", "groups", "depthwise", "one pixel"])
def test_memory_format_is_kept(name):
    case = CASES[name]
    dense = dense_of(case)
    module = module_of(dense)
    x = torch.randn(case.batch, case.channels, *case.size)
    moved = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(module(moved), module(x))
        assert module(moved).is_contiguous(memory_format=torch.channels_last)
        strided = torch.randn(case.batch, case.channels * 2, *case.size)[:, ::2]
        assert torch.equal(module(strided), module(strided.contiguous()))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", (2, 1)])
def test_paddings(mode, padding):
    dense = nn.Conv2d(6, 8, (3, 4), padding=padding, padding_mode=mode, dilation=(1, 2)).eval()
    x = torch.randn(2, 6, 9, 11)
    module = module_of(dense)
    with torch.no_grad():
        expected = dense(x)
        assert module(x).shape == expected.shape
        assert (module(x) - expected).norm() <= 0.03 * expected.norm()
        assert (module.dequantize()(x) - expected).norm() <= 0.03 * expected.norm()
        assert torch.equal(module(x[0]), module(x[:1])[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": 3, "padding": 1, "output_padding": 2},
        {"dilation": 2, "padding": 3},
        {"bias": False},
    ],
)
def test_transposed(options):
    torch.manual_seed(0)
    dense = nn.ConvTranspose1d(10, 7, 4, **options).eval()
    module = module_of(dense)
    x = torch.randn(2, 10, 13)
    with torch.no_grad():
        expected, rounded = dense(x), module.dequantize()
        assert module(x).shape == expected.shape
        assert (module(x) - expected).norm() <= 0.03 * expected.norm()
        assert (rounded(x) - expected).norm() <= 0.03 * expected.norm()
        assert torch.equal(module(x[0]), module(x[:1])[0])
        if options.get("stride", 1) > 1:
            size = [expected.shape[-1] + 1 - options.get("output_padding", 0)]
            assert module(x, size).shape == dense(x, size).shape
    with pytest.raises(ValueError, match="groups=2"):
        module_of(nn.ConvTranspose1d(4, 4, 3, groups=2))


def test_gradients_are_those_of_the_rounded_layer():
    case = CASES["groups"]
    module = module_of(dense_of(case))
    rounded = module.dequantize()
    x = torch.randn(case.batch, case.channels, *case.size, requires_grad=True)
    module.bias.requires_grad_(True)
    rounded.bias.requires_grad_(True)
    weights = torch.randn_like(module(x))
    (module(x) * weights).sum().backward()
    mine, mine_bias = x.grad.clone(), module.bias.grad.clone()
    x.grad = None
    (rounded(x) * weights).sum().backward()
    assert torch.allclose(mine, x.grad, atol=1e-4)
    assert torch.allclose(mine_bias, rounded.bias.grad, rtol=1e-4)


@pytest.mark.parametrize("name", ["3x3", "1-D"])
def test_opcheck(name):
    case = CASES[name]
    module = module_of(dense_of(case))
    module.pack()
    x = torch.randn(case.batch, case.channels, *case.size, requires_grad=True)
    args = (x, module.packed, module.bias, "w8a8", module.layout, case.out, *map(list, case.geometry[:4]), case.groups)
    torch.library.opcheck(torch.ops.nybble.conv.default, args)


@pytest.mark.parametrize("name", ["3x3", "1-D"])
def test_compiled_and_exported(name):
    case = CASES[name]
    module = nn.Sequential(module_of(dense_of(case)), nn.ReLU())
    x = torch.randn(case.batch, case.channels, *case.size)
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
        assert torch.equal(torch.export.export(module, (x,)).module()(x), expected)


def test_refusals():
    module = module_of(dense_of(CASES["3x3"]))
    with pytest.raises(ValueError, match=r"x: 15 channels, must be in_channels=16"):
        module(torch.randn(1, 15, 8, 8))
    with pytest.raises(ValueError, match=r"x: .*float64"):
        module(torch.randn(1, 16, 8, 8).double())
    with pytest.raises(ValueError, match="dimensions"):
        module(torch.randn(16))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        module_of(nn.Conv2d(2, 2, 5))(torch.randn(1, 2, 4, 9))
    with pytest.raises(TypeError, match=r"torch\.nn\.Conv2d"):
        nybble.nn.Conv2d.from_dense(nn.Conv1d(2, 2, 2), "w8a8")
    x = torch.randn(1, 16, 8, 8)
    module.pack()
    with pytest.raises(ValueError, match="packed: has"):
        ops_conv(module, x, packed=module.packed[:-1])
    with pytest.raises(ValueError, match="bias"):
        ops_conv(module, x, bias=torch.zeros(3))


def ops_conv(module, x, **more):
    parts = {"packed": module.packed, "bias": module.bias, "scheme": "w8a8", "layout": module.layout}
    return conv_op.conv(x, **(parts | more), out_channels=module.out_channels, geometry=module._geometry)


def test_empty_batch_and_functional_shape():
    module = module_of(dense_of(CASES["3x3"]))
    assert module(torch.randn(0, 16, 8, 8)).shape == (0, 16, 8, 8)
    patches = functional.unfold(torch.randn(1, 16, 8, 8), 3, padding=1)
    assert patches.shape[1] == module.in_features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kernel", "stride", "padding", "channels"), [(3, 2, 1, 24), (2, 2, 0, 5), (5, 3, 2, 33)])
def test_pools(dtype, kernel, stride, padding, channels):
    x = last(torch.randn(2, channels, 11, 8, generator=torch.Generator().manual_seed(2)).to(dtype))
    pairs = [(one, one) for one in (kernel, stride, padding, 1)]
    wanted = functional.max_pool2d(x, kernel, stride, padding)
    out, ranges = last(torch.empty_like(wanted)), torch.empty(2, 3)
    BoundPool("max", Geometry(*pairs, 1), x.shape)(x, out, None, (None, ranges))
    assert torch.equal(out, wanted)
    found = [[min(float(one.min()), 0), max(float(one.max()), 0), 0] for one in wanted]
    assert ranges.tolist() == found
    size = tuple(x.shape[2:])
    mean = last(torch.empty(2, channels, 1, 1, dtype=dtype))
    BoundPool("mean", Geometry(size, size, (0, 0), (1, 1), 1), x.shape)(x, mean, None, (None, ranges))
    assert torch.allclose(mean.float(), x.float().mean((2, 3), keepdim=True), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["3x3", "3x3 wide", "depthwise", "depthwise wide", "groups"])
def test_ranges_are_those_of_the_outputs(name, dtype):
    case = CASES[name]
    module = module_of(dense_of(case))
    module.pack()
    x = last(torch.randn(case.batch, case.channels, *case.size).to(dtype))
    parts = (module.packed, module.bias, "w8a8", module.layout, case.out, case.geometry)
    bound = BoundConv(*parts, x.shape, dtype, Epilogue(None, "relu", 1.5), None)
    out = last(torch.empty(case.batch, case.out, *case.geometry.out_size(case.size), dtype=dtype))
    ranges = torch.empty(case.batch, 3)
    bound(x, out, None, (None, ranges))
    assert torch.equal(out, module(x).relu().clamp(max=1.5))
    assert ranges.tolist() == [[0.0, float(one.max()), 0.0] for one in out]
    again = torch.empty_like(out)
    low, high = (x.amin((1, 2, 3)).clamp(max=0), x.amax((1, 2, 3)).clamp(min=0))
    bound(x, again, None, (torch.stack([low, high, torch.zeros(len(x))], 1).float().contiguous(), ranges))
    assert torch.equal(again, out)
    bound(torch.full_like(x, float("nan")), again, None, (None, ranges))
    assert ranges[:, 2].tolist() == [1.0] * case.batch
