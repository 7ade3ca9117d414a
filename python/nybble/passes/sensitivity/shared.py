"""Sensitivity on several ranks that share batches: what each measures on its own becomes what one process would have measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...evaluate.outputs import Sums
from ...parallel.ranks import Message, Ranks


def all_of(ranks: Ranks | None, own: bool) -> bool:
    """Whether something holds on all ranks."""
    return own if ranks is None else all(message.facts for message in ranks.gather(Message(own)))


def sums_of(ranks: Ranks | None, own: Sums) -> Sums:
    """The sums of all sequences and their weights, float64 (B,) each; those of rank 0 come first."""
    if ranks is None:
        return own
    found = [message.tensors for message in ranks.gather(Message(None, {"total": own[0], "weight": own[1]}))]
    return torch.cat([one["total"] for one in found]), torch.cat([one["weight"] for one in found])


def largest_of(ranks: Ranks | None, own: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The largest inputs (K,) of each layer on any rank; None for a layer that none has called."""
    if ranks is None:
        return list(own)
    held = {str(i): one for i, one in enumerate(own) if one is not None}
    told = [message.tensors for message in ranks.gather(Message(None, held))]
    found = [[one[str(i)] for one in told if str(i) in one] for i in range(len(own))]
    return [torch.stack(each).amax(0) if each else None for each in found]


def counts_of(ranks: Ranks | None, own: Mapping[str, int]) -> dict[str, int]:
    """How often each reason was given, on all ranks together."""
    told = [own] if ranks is None else [message.facts for message in ranks.gather(Message(dict(own)))]
    found: Counter[str] = Counter()
    for one in told:
        found.update(one)
    return dict(found)
