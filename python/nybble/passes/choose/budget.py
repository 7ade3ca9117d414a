"""The budget of a plan: a limit on bytes, milliseconds or harm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ...weights.scheme import Scheme

KINDS = ("bytes", "ms", "harm")


class Budget(NamedTuple):
    """An upper limit of one kind. If it is a scheme, the limit is the cost of giving all layers that scheme."""

    kind: str
    limit: float | Scheme

    @classmethod
    def parse(cls, budget: Mapping[str, float | str]) -> Budget:
        """Reads ``{"bytes": 5e6}`` or ``{"ms": "w8a8"}``. Raises TypeError or ValueError."""
        if not isinstance(budget, Mapping) or len(budget) != 1:
            raise TypeError(
                f"budget={budget!r}: must map one of {', '.join(KINDS)} to its limit, such as {{'bytes': 5e6}}"
            )
        ((kind, limit),) = budget.items()
        if kind not in KINDS:
            raise ValueError(f"budget={budget!r}: its key {kind!r} must be one of {', '.join(KINDS)}")
        if isinstance(limit, (str, Scheme)):
            return cls(kind, Scheme.parse(limit))
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not (math.isfinite(limit) and limit >= 0):
            raise ValueError(f"budget={budget!r}: the limit must be a number of at least 0, or a scheme")
        return cls(kind, float(limit))
