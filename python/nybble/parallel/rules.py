"""DTensor's rules for nybble's ops: rows of inputs may lie on different ranks; the packed weight is whole on each.

A layer whose weight is cut over ranks calls the ops with its share alone, see ``styles``; for DTensor it is a whole layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

# Not from the package, which may be what is being imported.
from torch.distributed.tensor.experimental._register_sharding import register_sharding

_Rule = tuple[list[Any], list[Any]]


def register() -> None:
    """Tell DTensor the rules."""
    library = torch.ops.nybble
    register_sharding(library.linear.default)(_by_rows)
    register_sharding(library.linear_part.default)(_by_rows)
    register_sharding(library.dequantize.default)(_whole)


def _by_rows(x: Any, packed: Any, bias: Any, *rest: Any) -> Sequence[_Rule]:
    weight = [Replicate(), None if bias is None else Replicate(), *(None for _ in rest)]
    rows = [Replicate(), *(Shard(dim) for dim in range(x.ndim - 1))]
    return [([place], [place, *weight]) for place in rows]


def _whole(packed: Any, *rest: Any) -> Sequence[_Rule]:
    return [([Replicate()], [Replicate(), *(None for _ in rest)])]
