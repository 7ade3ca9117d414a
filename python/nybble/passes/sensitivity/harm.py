"""Harm: how much the output of a changed model differs from that of the original, on the same data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...evaluate.data import sequences
from ...evaluate.outputs import Sums, kl_sums, main_output, output_error_sums
from ...evaluate.result import Metric
from ...evaluate.table import mean_metric
from ...model.batches import call
from ...parallel.ranks import Ranks
from .shared import all_of, sums_of

MEASURES = {"kl": kl_sums, "output": output_error_sums}


class Harm:
    """Holds the outputs of the original model, and compares those of the model as it is now.

    Args:
        measure: "kl": KL(before || after) of the softmax of the output, in nats per token. "output": the squared change
            of the output relative to its square.
        ranks: those whose sequences count too, or None.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], measure: str, seed: int, ranks: Ranks | None = None
    ) -> None:
        self._model, self._batches, self._sums, self._seed = model, batches, MEASURES[measure], seed
        self._ranks = ranks
        self._before = [self._output(batch) for batch in batches]
        if not all_of(ranks, all(bool(torch.isfinite(output).all()) for output in self._before)):
            raise ValueError("model: its output on the data has NaN or Inf before any layer is changed")
        self.sequences = sum(map(sequences, batches))

    def _output(self, batch: Any) -> Tensor:
        return main_output(call(self._model, batch))

    def by_sequence(self) -> Sums:
        """The sum over each sequence and its weight, of the model as it is now."""
        sums = [
            self._sums(self._output(batch), before, batch)
            for batch, before in zip(self._batches, self._before, strict=True)
        ]
        own = torch.cat([total for total, _ in sums]), torch.cat([weight for _, weight in sums])
        return sums_of(self._ranks, own)

    def __call__(self) -> Metric:
        """The mean harm of the model as it is now, with its bootstrap interval over sequences."""
        return mean_metric(*self.by_sequence(), self._seed)
