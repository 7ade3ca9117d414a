"""The first use of a GPU: each compiled CUDA kernel multiplies one small weight, next to the reference. One that disagrees,
or that the driver refuses, is said and left out from then on, so that the next kernel takes over."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch

from . import layouts, reference
from .registry import DISTRUSTED, KernelSpec, specs
from .rounding import QuantizedWeight, quantize_weight
from .scheme import Scheme

# Outputs, groups and inputs that fill no tile, and K that is split.
_N, _K = 72, 1096
# Of the largest output: bfloat16 has 2^-8.
_TOLERANCE = 0.02


@lru_cache
def check_once() -> None:
    """Fills registry.DISTRUSTED, with a warning for each entry. Waits for the device: never in a captured graph."""
    for spec in specs():
        if spec.target == "sm80" and spec.built:
            reason = disagreement(spec, "cuda")
            if reason is not None:
                DISTRUSTED[spec.name] = reason
                warnings.warn(f"nybble: {spec.name} is not used on this GPU: {reason}", RuntimeWarning, stacklevel=2)


def _scheme(spec: KernelSpec) -> Scheme:
    """One that a kernel computes: with groups and zero points where it has them."""
    weight_bits, act_bits = map(int, spec.scheme.removeprefix("sp").removeprefix("w").split("a"))
    four, sparse = weight_bits == 4, spec.sparsity is not None
    return Scheme(weight_bits, act_bits, 64 if four else None, symmetric=not four or sparse, sparsity=spec.sparsity)


def disagreement(spec: KernelSpec, device: str) -> str | None:
    """What is wrong with a kernel's outputs for its fewest and for its most tokens, up to 65; None: nothing."""
    scheme = _scheme(spec)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_N, _K, generator=generator)
    if scheme.sparsity is not None:
        # Two of each four, in any places.
        weight *= torch.rand(_N, _K // 4, 4, generator=generator).argsort(-1).lt(2).view(_N, _K)
    quantized = quantize_weight(weight, scheme)
    there = QuantizedWeight(**{name: tensor.to(device) for name, tensor in quantized.tensors().items()})
    packed = layouts.pack(there, spec.layout, scheme, _K)
    assert spec.make is not None, "linear kernels can run"  # noqa: S101
    plan = spec.make(scheme, _N, _K)
    least, most = spec.m_range
    for m in (least, min(most or 65, 65)):
        x = torch.randn(m, _K, generator=generator).to(torch.bfloat16)
        out = torch.full((m, _N), torch.nan, dtype=x.dtype, device=device)
        try:
            plan(x.to(device), packed, None, out)
            got = out.cpu().double()
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        expected = reference.linear(x, quantized, None, scheme, torch.float64)
        worst = float((got - expected).abs().max() / expected.abs().max())
        if not worst <= _TOLERANCE:
            return f"its outputs for {m} tokens are off by {worst:.2g} of the largest"
    return None
