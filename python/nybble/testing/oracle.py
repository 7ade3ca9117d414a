"""Random weights, runs of a single kernel, and the float64 oracle with its error bounds."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import layouts, ops
from ..dispatch import reference
from ..dispatch.spec import KernelSpec
from ..weights.activations import ActScale
from ..weights.form import USUAL, Form
from ..weights.levels import BLOCK, MOST
from ..weights.rounding import QuantizedWeight, dequantize_weight
from ..weights.scheme import Scheme, numbers_of
from ..weights.sparsity import Block, Unstructured
from ..weights.weight_type import FloatType

# (M, N, K) by name.
SHAPES = {
    "empty": (0, 33, 70),
    "one": (1, 1, 1),
    "token": (1, 33, 70),
    "tile": (4, 16, 32),
    "below-group": (3, 5, 7),
    "odd-k": (7, 17, 129),
    "row-tails": (13, 48, 96),
    "column-tails": (12, 31, 64),
    "group-tail": (2, 40, 200),
    "wide": (5, 300, 128),
    "deep": (3, 18, 1000),
    "rows": (67, 24, 136),
    "last-column": (20, 33, 200),
}

SPARSE_SCHEMES = {
    "spw8": ("sp50{}", "sp24{}", "sp32of128{}"),
    "spw1": ("sp24{}",),
    "spw4": ("sp50{}", "sp50{}g32", "sp24{}g64", "sp32of128{}g128"),
    "bsw8": ("bs16x4{}", "bs48x64{}"),
}

# Unit roundoff: relative to the value, and absolute for subnormal values.
OUT_EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OUT_FLOOR = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25}


def schemes_of(family: str) -> list[Scheme]:
    """Every scheme of a family such as "w4a8"; for sparse families, a selection."""
    if family.startswith(("sp", "bs")):
        return [Scheme.parse(name.format(family[2:])) for name in _sparse_schemes(family)]
    kind, act_bits = numbers_of(family)
    symmetries = (True,) if kind.zero_point is None else (True, False)
    return [
        Scheme(kind.bits, act_bits, group, symmetric, book=kind.book)
        for group in kind.sizes
        for symmetric in symmetries
    ]


def _sparse_schemes(family: str) -> tuple[str, ...]:
    """Names of sparse schemes with {} for the rest of the family; for the types of plug-ins, one."""
    return SPARSE_SCHEMES.get(family[:4], ("bs16x4{}",) if family.startswith("bs") else ("sp24{}",))


def served_by(spec: KernelSpec) -> list[Scheme]:
    """The schemes of a kernel's family that it supports; for sparse families, a selection."""
    return [scheme for scheme in schemes_of(spec.scheme) if spec.serves(scheme)]


def random_weight(
    scheme: Scheme,
    out_features: int,
    in_features: int,
    seed: int = 0,
    unit_scale: bool = False,
    form: Form = USUAL,
) -> QuantizedWeight:
    """A random weight: codes over their full range, scales over four octaves (or all 1), random zero points.

    A sparse scheme gets its pattern at random places; for block patterns, half of the blocks are zero.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    shape, kind = (out_features, in_features), scheme.weight_type
    groups = (out_features, scheme.groups(in_features))
    octaves = torch.rand(groups, generator=generator) * 4 - 8
    stored = form.scale or kind.scale
    scale = torch.ones(groups, dtype=stored) if unit_scale else torch.exp2(octaves).to(stored)
    kept = random_mask(scheme, out_features, in_features, generator)
    order = torch.randperm(in_features, generator=generator, dtype=torch.int32) if scheme.ordered else None
    if isinstance(kind, FloatType):
        values = torch.randn(shape, generator=generator) * kept
        return QuantizedWeight(kind.pack(values), torch.ones(groups), None, order)
    codes = integers(*kind.ends, shape).where(kept, kind.middle)
    zero_point = None
    if kind.levels:
        return _random_levels(kind.pack(codes), octaves, order, unit_scale, generator)
    if form.minimum:
        return QuantizedWeight(kind.pack(codes), scale, None, order, -integers(0, 15, groups).to(stored) * scale)
    if not scheme.symmetric and kind.zero_point is not None:
        zero_point = integers(*kind.ends, groups).to(kind.zero_point)
    book = None
    if kind.table:
        values = torch.randn(len(kind.table), generator=generator)
        book = (values * 4).round() if unit_scale else values
    return QuantizedWeight(kind.pack(codes), scale, zero_point, order, book=book)


def _random_levels(
    packed: Tensor, octaves: Tensor, order: Tensor | None, unit_scale: bool, generator: torch.Generator
) -> QuantizedWeight:
    """A weight with levels: scales and minimums of both signs over four octaves, and levels of all values; or, with
    unit_scale, all scales 1, and minimums from 0 to -15."""
    groups, most = octaves.shape[1], 15 if unit_scale else MOST
    levels = torch.randint(0, most + 1, (len(packed), groups, 2), generator=generator, dtype=torch.uint8)
    signs = torch.randint(0, 2, (2, *octaves[:, ::BLOCK].shape), generator=generator) * 2.0 - 1
    scale = signs * torch.exp2(octaves[:, ::BLOCK] - 4)
    if unit_scale:
        levels[..., 0], scale = 1, torch.ones_like(signs)
    scale, minimum = scale.to(torch.float16)
    return QuantizedWeight(packed, scale, None, order, minimum, levels=levels.flatten(1))


def random_mask(
    scheme: Scheme, out_features: int, in_features: int, generator: torch.Generator, zero_blocks: float = 0.5
) -> Tensor:
    """A random mask of kept weights, bool (N, K); zero_blocks: the probability that a block is zero."""
    sparsity, shape = scheme.sparsity, (out_features, in_features)
    if sparsity is None:
        return torch.ones(shape, dtype=torch.bool)
    if isinstance(sparsity, Block):
        strips, width = -(-out_features // sparsity.rows), -(-in_features // sparsity.columns)
        blocks = torch.rand(strips, width, generator=generator) >= zero_blocks
        whole = blocks.repeat_interleave(sparsity.rows, 0).repeat_interleave(sparsity.columns, 1)
        return whole[:out_features, :in_features]
    if isinstance(sparsity, Unstructured):
        return torch.rand(shape, generator=generator) >= sparsity.zeros
    groups = -(-in_features // sparsity.m)
    order = torch.rand(out_features, groups, sparsity.m, generator=generator).argsort(-1)
    return (order < sparsity.n).flatten(1)[:, :in_features]


def run(
    spec: KernelSpec,
    quantized: QuantizedWeight,
    scheme: Scheme,
    x: Tensor,
    bias: Tensor | None = None,
    act: ActScale | None = None,
) -> Tensor:
    """The output (M, N) of this kernel, in x's dtype and on x's device, without dispatch.

    act: the scale of static activations.
    """
    out = torch.full((x.shape[0], quantized.qweight.shape[0]), torch.nan, dtype=x.dtype, device=x.device)
    run_into(spec, quantized, scheme, x, bias, out, act)
    return out


def pack_for(spec: KernelSpec, quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> Tensor:
    """The weight packed for a kernel, by the layout's reference implementation in torch if it has one."""
    layout = Form.of(quantized.tensors(), scheme).of_layout(spec.layout)
    if scheme.sparsity is None or spec.layout == layouts.PLAIN:
        return layouts.pack(quantized, layout, scheme, in_features)
    return ops.pack_as(quantized, layout, scheme, in_features)


def run_into(
    spec: KernelSpec,
    quantized: QuantizedWeight,
    scheme: Scheme,
    x: Tensor,
    bias: Tensor | None,
    out: Tensor,
    act: ActScale | None = None,
) -> None:
    """As ``run``, into a contiguous ``out`` (M, N); an int32 ``out`` receives the accumulators."""
    packed = pack_for(spec, quantized, scheme, x.shape[1])
    if act is not None:
        packed = act.before(packed)
    bias = None if bias is None else bias.to(x.device)
    plan = spec.plan(scheme, out.shape[1], x.shape[1], Form.of(quantized.tensors(), scheme))
    plan(x, packed.to(x.device), bias, out)


def error_bound(
    x: Tensor,
    quantized: QuantizedWeight,
    scheme: Scheme,
    expected: Tensor,
    dtype: torch.dtype,
    act: ActScale | None = None,
) -> Tensor:
    """The error bound of each output (M, N) against the float64 result, for float32 sums stored as ``dtype``.

    4 sqrt(K) u sum(|x| |w|) for the sum, plus one rounding of the output. Quantized activations add no error, since the
    reference rounds them to the same codes. For subnormal outputs the bound is absolute.
    """
    weight = dequantize_weight(quantized, scheme, x.shape[1]).double()
    codes = reference.quantize(x, act, scheme.act_type) if scheme.act_type.quantized else None
    return _bound(x, codes, weight, quantized, scheme, expected, dtype)


def _bound(
    x: Tensor,
    codes: reference.Activations | None,
    weight: Tensor,
    quantized: QuantizedWeight,
    scheme: Scheme,
    expected: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """``error_bound``, given the codes of x, if it has any, and the weight in float64."""
    weight = weight.abs()
    if quantized.minimum is not None:  # which is multiplied on its own
        steps = replace(quantized, minimum=torch.zeros_like(quantized.minimum))
        least = replace(quantized, qweight=torch.zeros_like(quantized.qweight))
        weight = torch.stack(
            [dequantize_weight(part, scheme, x.shape[1]).double().abs() for part in (steps, least)]
        ).sum(0)
    if codes is None:
        magnitude = x.double().abs()
    else:  # codes and zero point are multiplied separately, so both magnitudes count
        whole = codes.codes.double().abs() + codes.zero.double().abs()[:, None]
        magnitude = whole * codes.scale.double()[:, None]
    size = expected.abs()
    total = magnitude @ weight.t() + size
    rounding: float = 4 * max(x.shape[1], 4) ** 0.5 * 2.0**-24
    return rounding * total + size * OUT_EPSILON[dtype] + OUT_FLOOR[dtype]


def expected_output(
    spec: KernelSpec, scheme: Scheme, x: Tensor, quantized: QuantizedWeight, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The float64 result that a kernel must approximate, and the error bound of each output, on x's device."""
    dtype = x.dtype
    if spec.rounds is not None and dtype == torch.float32:
        x = x.to(spec.rounds)
    if spec.rounds_book and quantized.book is not None:
        quantized = replace(quantized, book=quantized.book.bfloat16().float())
    weight = dequantize_weight(quantized, scheme, x.shape[1]).double()
    codes = reference.quantize(x, None, scheme.act_type) if scheme.act_type.quantized else None
    right = reference.product(x, codes, weight, bias)
    bound = _bound(x, codes, weight, quantized, scheme, right, dtype)
    if spec.rounds_weight:  # the kernel also rounds each weight and the bias
        size = (x.double().square() @ weight.square().t()).sqrt() + right.abs()
        bound = bound + 8 * OUT_EPSILON[dtype] * (size if bias is None else size + bias.double().abs())
    return right, bound
