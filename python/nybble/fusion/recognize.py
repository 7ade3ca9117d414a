"""Which norm or activation function a leaf module computes: found by trying, not by its class."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..rows import ACTIVATIONS
from .nodes import IDENTITY, NormKind

# Relative error up to which two float32 formulas count as the same.
CLOSE = 1e-5
# Root mean squares of the probes: small ones tell one eps from another.
_SIZES = (1.0, 1e-2)


def close(value: Tensor, expected: Tensor) -> bool:
    """Whether two results agree within the rounding of their dtype."""
    bound = max(CLOSE, 4 * torch.finfo(expected.dtype).eps)
    error = (value.double() - expected.double()).norm()
    return bool(error <= bound * expected.double().norm() + 1e-30)


def activation_of(module: nn.Module, x: Tensor) -> str | None:
    """The name of the activation function that a module computes, IDENTITY, or None. x: an input that it was seen with."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return None
    probe = torch.linspace(-6, 6, 97, device=x.device).to(x.dtype)
    result = _try(module, probe)
    if result is None:
        return None
    if torch.equal(result, probe):
        return IDENTITY
    return next((name for name, act in ACTIVATIONS.items() if close(result, act(probe))), None)


def norm_of(module: nn.Module, x: Tensor) -> NormKind | None:
    """The norm over the last dimension that a module computes, or None. x: an input that it was seen with."""
    width = x.shape[-1]
    held = dict(module.named_parameters(recurse=False))
    weight, bias = held.pop("weight", None), held.pop("bias", None)
    if held or any(part is not None and part.shape != (width,) for part in (weight, bias)):
        return None
    draw = torch.Generator(device="cpu").manual_seed(0)
    # A mean that is not 0 tells layer norm from root-mean-square norm.
    probes = [((torch.randn(5, width, generator=draw) + 0.5) * size).to(x.device, x.dtype) for size in _SIZES]
    results = [_try(module, probe) for probe in probes]
    for norm in _norms(module, weight, bias, x.dtype):
        if all(
            result is not None and close(result, norm.of(probe)) for probe, result in zip(probes, results, strict=True)
        ):
            return norm
    return None


def _norms(module: nn.Module, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Iterator[NormKind]:
    given = [value for value in vars(module).values() if isinstance(value, float) and 0 <= value < 0.1]
    for eps in dict.fromkeys([*given, torch.finfo(dtype).eps]):
        yield NormKind("layer", weight, bias, eps)
        if bias is None:
            yield NormKind("rms", weight, None, eps)
            if weight is not None:
                yield NormKind("rms", weight, None, eps, offset=1.0)


def _try(module: nn.Module, probe: Tensor) -> Tensor | None:
    """The module's output for a probe, if it takes it and keeps its shape."""
    try:
        with torch.no_grad():
            result = module.forward(probe)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return None
    return result if isinstance(result, Tensor) and result.shape == probe.shape else None
