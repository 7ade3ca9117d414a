"""The contestants of `nybble demo --sparse`: accuracy, speed and size of each sparsity pattern."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ..passes.sparsify import sparsify
from .model import Batch
from .variants import BF16, FP32, VARIANTS, W8A8, Built, Variant

PATTERNS = ("50%", "2:4", "64:128", "70%", "32:128", "16:128")
METHODS = ("magnitude", "wanda", "sparsegpt")
# SparseGPT's Hessian needs more calibration text than Wanda's input norms.
SHARE_OF_TEXT = {"wanda": 0.25, "sparsegpt": 1.0}


def name_of(pattern: str, method: str) -> str:
    """The name of a contestant in the table."""
    return f"{pattern} {method} w8a8"


def contestants(calibration: Sequence[Batch]) -> tuple[Variant, ...]:
    """torch in fp32 and bf16, dense w8a8, and every pattern by every method with w8a8.

    calibration: batches without any of the measured sentences.
    """

    def build(pattern: str, method: str) -> Callable[[nn.Module], Built]:
        share = SHARE_OF_TEXT.get(method, 0.0)
        batches = list(calibration[: max(1, round(share * len(calibration)))]) if share else None
        return lambda model: Built(
            model, sparsify(model, pattern, method=method, calibration=batches, scheme="w8a8", goal="memory")
        )

    dense = tuple(variant for variant in VARIANTS if variant.name in (FP32, BF16, W8A8))
    sparse = tuple(
        Variant(name_of(pattern, method), build(pattern, method)) for pattern in PATTERNS for method in METHODS
    )
    return dense + sparse
