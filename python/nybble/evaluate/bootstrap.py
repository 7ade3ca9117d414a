"""Bootstrap confidence intervals over sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DRAWS, COVERAGE = 1000, 0.95


def interval(statistic: Callable[[Tensor], Tensor], count: int, seed: int) -> tuple[float, float] | None:
    """The 95 % interval of a statistic over ``count`` sequences, resampled with replacement.

    Percentile bootstrap (Efron 1979), seeded. ``statistic`` maps indices, int64 (DRAWS, count), to values (DRAWS,).
    None for fewer than two sequences, or if a value is not finite.
    """
    if count < 2:
        return None
    draws = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(seed))
    values = statistic(draws).double()
    if not torch.isfinite(values).all():
        return None
    edge = (1 - COVERAGE) / 2
    low, high = torch.quantile(values, torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return low, high
