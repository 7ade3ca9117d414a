"""What the tests and the bench share: weights that reach every code, guard pages, error bounds, a model for passes."""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import layouts, ops
from ..dispatch import reference
from ..dispatch.spec import KernelSpec
from ..model.inputs import Inputs
from ..nn import Linear
from ..passes.sensitivity.variants import PRUNE, apply
from ..passes.sparsify import sparsify
from ..report.report import Report
from ..weights.activations import ActScale
from ..weights.rounding import QuantizedWeight, dequantize_weight
from ..weights.scheme import Scheme, numbers_of
from ..weights.sparsity import Block, Unstructured
from ..weights.weight_type import FloatType

CANARY = 0xCD

# (M, N, K) by what is special about them.
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

# Unit roundoff, relative to the value, and absolute where the value is subnormal.
OUT_EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OUT_FLOOR = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25}


def schemes_of(family: str) -> list[Scheme]:
    """Every scheme of a family such as "w4a8"; of the many sparse ones, a few."""
    if family.startswith(("sp", "bs")):
        return [Scheme.parse(name.format(family[2:])) for name in SPARSE_SCHEMES[family[:4]]]
    kind, act_bits = numbers_of(family)
    symmetries = (True,) if kind.zero_point is None else (True, False)
    sizes = (None, *kind.group_sizes)
    return [Scheme(kind.bits, act_bits, group, symmetric) for group in sizes for symmetric in symmetries]


def served_by(spec: KernelSpec) -> list[Scheme]:
    """The schemes of a kernel's family that it takes, of the many sparse ones a few."""
    return [scheme for scheme in schemes_of(spec.scheme) if spec.sparsity in (None, scheme.sparsity)]


def random_weight(
    scheme: Scheme, out_features: int, in_features: int, seed: int = 0, unit_scale: bool = False
) -> QuantizedWeight:
    """Codes that fill their whole range, scales over four octaves (or all 1), random zero points.

    Sparse weights have the scheme's zeros, at random; half of the blocks are zero.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    shape, kind = (out_features, in_features), scheme.weight_type
    groups = (out_features, scheme.groups(in_features))
    octaves = torch.rand(groups, generator=generator) * 4 - 8
    scale = torch.ones(groups, dtype=kind.scale) if unit_scale else torch.exp2(octaves).to(kind.scale)
    kept = random_mask(scheme, out_features, in_features, generator)
    if isinstance(kind, FloatType):
        values = torch.randn(shape, generator=generator) * kept
        return QuantizedWeight(kind.pack(values), torch.ones(groups))
    codes = integers(kind.lowest, kind.highest, shape).where(kept, kind.middle)
    zero_point = None
    if not scheme.symmetric and kind.zero_point is not None:
        zero_point = integers(kind.lowest, kind.highest, groups).to(kind.zero_point)
    return QuantizedWeight(kind.pack(codes), scale, zero_point)


def random_mask(
    scheme: Scheme, out_features: int, in_features: int, generator: torch.Generator, zero_blocks: float = 0.5
) -> Tensor:
    """Which weights of a random one are kept, bool (N, K); zero_blocks: the share of blocks that are zero."""
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
    """A kernel's output (M, N) in x's dtype on x's device, whatever dispatch would have chosen.

    act: of static activations.
    """
    out = torch.full((x.shape[0], quantized.qweight.shape[0]), torch.nan, dtype=x.dtype, device=x.device)
    run_into(spec, quantized, scheme, x, bias, out, act)
    return out


def pack_for(spec: KernelSpec, quantized: QuantizedWeight, scheme: Scheme, in_features: int) -> Tensor:
    """The weight as a kernel wants it, on its device: by the definition in torch, if there is one."""
    if scheme.sparsity is None or spec.layout == layouts.PLAIN:
        return layouts.pack(quantized, spec.layout, scheme, in_features)
    return ops.pack_as(quantized, spec.layout, scheme, in_features)


def run_into(
    spec: KernelSpec,
    quantized: QuantizedWeight,
    scheme: Scheme,
    x: Tensor,
    bias: Tensor | None,
    out: Tensor,
    act: ActScale | None = None,
) -> None:
    """As run, into `out` (M, N), contiguous; int32 for accumulators."""
    if spec.make is None:
        raise ValueError(f"spec: {spec.name} is not a linear kernel")
    packed = pack_for(spec, quantized, scheme, x.shape[1])
    if act is not None:
        packed = act.before(packed)
    there = None if bias is None else bias.to(x.device)
    spec.make(scheme, out.shape[1], x.shape[1])(x, packed.to(x.device), there, out)


def error_bound(
    x: Tensor,
    quantized: QuantizedWeight,
    scheme: Scheme,
    expected: Tensor,
    dtype: torch.dtype,
    act: ActScale | None = None,
) -> Tensor:
    """How far each output (M, N), computed in float32 and stored as dtype, may lie from the float64 result.

    4 sqrt(K) u sum(|x| |w|) for the sum, and one rounding of the output. Quantized activations add nothing: the
    reference rounds them to the same codes. Sums below 2^-126 keep their absolute size alone.
    """
    weight = dequantize_weight(quantized, scheme, x.shape[1]).double().abs()
    magnitude = x.double().abs()
    if scheme.act_bits == 8:
        # Codes and zero point are multiplied apart, so neither's magnitude cancels.
        codes, scale, zero = reference.quantize(x, act)
        magnitude = (codes.double().abs() + zero.double().abs()[:, None]) * scale.double()[:, None]
    total = magnitude @ weight.t() + expected.abs()
    bound: Tensor = (
        4 * max(x.shape[1], 4) ** 0.5 * 2.0**-24 * total + expected.abs() * OUT_EPSILON[dtype] + OUT_FLOOR[dtype]
    )
    return bound


def expected_output(
    spec: KernelSpec, scheme: Scheme, x: Tensor, quantized: QuantizedWeight, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The float64 result that a kernel is to come to, and how far each of its outputs may lie from it, on x's device."""
    dtype = x.dtype
    if spec.rounds is not None and dtype == torch.float32:
        x = x.to(spec.rounds)
    right = reference.linear(x, quantized, bias, scheme, torch.float64)
    bound = error_bound(x, quantized, scheme, right, dtype)
    if spec.rounds_weight:  # each weight on its own, and the bias
        weight = dequantize_weight(quantized, scheme, x.shape[1]).double()
        size = (x.double().square() @ weight.square().t()).sqrt() + right.abs()
        bound = bound + 8 * OUT_EPSILON[dtype] * (size if bias is None else size + bias.double().abs())
    return right, bound


@dataclass
class Guarded:
    """Memory that ends (or starts) at a page that faults, and the tensor that lies there."""

    tensor: Tensor
    canaries: Tensor

    def intact(self) -> bool:
        """Whether nobody wrote beside the tensor."""
        return bool((self.canaries == CANARY).all())


@contextmanager
def guarded(shape: tuple[int, ...], dtype: torch.dtype, flush: str) -> Iterator[Guarded]:
    """A tensor flush with a guard page on its "left" or its "right", with canaries on the other side."""
    page = mmap.PAGESIZE
    nbytes = dtype.itemsize * int(torch.Size(shape).numel())
    body = max(1, -(-(nbytes + 64) // page)) * page
    region = mmap.mmap(-1, body + 2 * page)
    anchor = ctypes.c_char.from_buffer(region)
    base = ctypes.addressof(anchor)
    for at in (0, page + body):
        _protect(base + at, page, 0)
    try:
        memory = torch.frombuffer(memoryview(region)[page : page + body], dtype=torch.uint8)
        memory.fill_(CANARY)
        data = memory[body - nbytes :] if flush == "right" else memory[:nbytes]
        canaries = memory[: body - nbytes] if flush == "right" else memory[nbytes:]
        yield Guarded(data.view(dtype).view(shape), canaries)
    finally:
        for at in (0, page + body):
            _protect(base + at, page, mmap.PROT_READ | mmap.PROT_WRITE)
        del anchor


def _protect(address: int, nbytes: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), protection) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return x + scale * self.down(torch.relu(self.up(self.norm(x)))), None


class Stack(nn.Module):
    """A small model for passes: Linear layers before, in and after repeated blocks. ids (B, T) in 0..49 -> (B, T, 8)."""

    def __init__(self, depth: int = 3, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 8)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits; the mask only says which tokens count."""
        x = self.first(self.embed(ids))
        for block in self.blocks:
            x = block(x, scale=0.5)[0]
        logits: Tensor = self.head(x)
        return logits


def token_batches(count: int = 4, seed: int = 0) -> list[Tensor]:
    """Calibration data for a Stack: int64 (4, 24) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (4, 24), generator=generator) for _ in range(count)]


def correlated_inputs(rows: int = 2048, k: int = 256) -> Tensor:
    """Rows (rows, k) of Gaussian noise with the correlation 0.9^distance between inputs."""
    distance = (torch.arange(k)[:, None] - torch.arange(k)).abs()
    root: Tensor = torch.linalg.cholesky(0.9 ** distance.float())
    return torch.randn(rows, k) @ root.T


def gathered(x: Tensor) -> Inputs:
    """What a layer that multiplies rows x (T, K) knows of its inputs, with the Hessian."""
    inputs = Inputs(x.shape[1], hessian=True)
    for batch in x.split(512):
        inputs.add(batch)
    return inputs


class Residual(nn.Module):
    """Logits (..., width) of x (..., width); each of its layers, without bias, adds as much as any other."""

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        for layer in self.layers:
            layer.weight.data = torch.randn(width, width, generator=draw) / width**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Layer after layer, on what is normalized to a root mean square of 1."""
        for layer in self.layers:
            x = x + layer(nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5)
        return x


def sparsify_small(model: nn.Module, pattern: Any = "50%", **options: Any) -> Report:
    """``sparsify`` for bytes alone, on a Stack's data unless other data is given."""
    return sparsify(model, pattern, **{"goal": "memory", "calibration": token_batches(), **options})


def give_scheme(model: nn.Module, scheme: str) -> None:
    """Gives all layers a scheme by rounding to nearest, and by magnitude where it names zeros."""
    parsed = Scheme.parse(scheme)
    apply(model, parsed, {} if parsed.sparsity is None else PRUNE)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The Linear layers by name, quantized or not."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Linear))}


def weight_of(layer: nn.Module) -> Tensor:
    """The dense weight (N, K) of a Linear layer."""
    weight: Tensor = layer.dequantized_weight() if isinstance(layer, Linear) else layer.weight.detach()  # type: ignore[operator]
    return weight


def snapshot(model: nn.Module) -> list[tuple[Any, ...]]:
    """Every module and tensor of a model as it is: equal lists mean that nothing has changed."""
    return [
        *((name, id(module), module.training) for name, module in model.named_modules()),
        *((name, id(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())),
        *((name, tensor.double().sum().item()) for name, tensor in model.state_dict().items()),
    ]
