"""Gather sums per sequence and times per batch of a model and its reference, and reduce them to metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..model.batches import call
from .bootstrap import interval
from .data import sequences
from .outputs import Sums, cosine_sums, kl_sums, loss_sums, main_output
from .result import Metric

Task = Callable[[Any, Any], Any]
# Metrics that compare with the reference.
COMPARED = {"kl": kl_sums, "cosine": cosine_sums}
OURS, THEIRS = "", "reference_"  # prefixes of metric names, for the model and the reference


class Table:
    """Gathers the sums of each sequence and the seconds of each batch."""

    def __init__(self, names: Sequence[str], tasks: dict[str, Task]) -> None:
        self._names, self._tasks = names, tasks
        self._sums: dict[str, list[Sums]] = {}
        self._seconds: dict[str, list[float]] = {}

    def add(self, batch: Any, models: Mapping[str, nn.Module], warm_up: bool) -> None:
        """Run the models, with keys OURS and THEIRS, on a batch, one after the other."""
        outputs = {prefix: self._run(prefix, module, batch, warm_up) for prefix, module in models.items()}
        if "perplexity" in self._names:
            for prefix, output in outputs.items():
                self._put(f"{prefix}perplexity", loss_sums(main_output(output), batch))
        for name in (name for name in self._names if name in COMPARED):
            ours, theirs = main_output(outputs[OURS]), main_output(outputs[THEIRS])
            self._put(name, COMPARED[name](ours, theirs, batch))

    def _run(self, prefix: str, module: nn.Module, batch: Any, warm_up: bool) -> Any:
        if warm_up and "latency" in self._names:
            call(module, batch)
        start = perf_counter()
        output = call(module, batch)
        self._seconds.setdefault(prefix, []).append(perf_counter() - start)
        for name, task in self._tasks.items():
            self._put(f"{prefix}{name}", _task_sums(name, task(output, batch), sequences(batch)))
        return output

    def _put(self, name: str, sums: Sums) -> None:
        self._sums.setdefault(name, []).append(sums)

    def metrics(self, seed: int) -> dict[str, Metric]:
        """The metrics over all batches so far."""
        whole = {name: tuple(map(torch.cat, zip(*sums, strict=True))) for name, sums in self._sums.items()}
        found = {}
        for name, (total, weight) in whole.items():
            found[name] = mean_metric(total, weight, seed, exp=name.removeprefix(THEIRS) == "perplexity")
        if f"{THEIRS}perplexity" in whole:
            (ours, weight), (theirs, _) = whole["perplexity"], whole[f"{THEIRS}perplexity"]
            found["delta_ln_ppl"] = mean_metric(ours - theirs, weight, seed)
        return found | (self._times(seed) if "latency" in self._names else {})

    def _times(self, seed: int) -> dict[str, Metric]:
        found = {}
        times = {prefix: torch.tensor(seconds, dtype=torch.float64) for prefix, seconds in self._seconds.items()}
        for prefix, seconds in times.items():
            found[f"{prefix}latency_ms"] = _median(1e3 * seconds, seed)
        if THEIRS in times:
            found["speedup"] = _median(times[THEIRS] / times[OURS], seed)
        return found


def _task_sums(name: str, values: Any, count: int) -> Sums:
    values = torch.as_tensor(values).detach().double().flatten()
    if len(values) not in (1, count):
        raise ValueError(f"metrics: {name} returned {len(values)} values for {count} sequences, must be 1 or {count}")
    return values.expand(count), torch.ones(count, dtype=torch.float64)


def mean_metric(total: Tensor, weight: Tensor, seed: int, exp: bool = False) -> Metric:
    """The weighted mean sum(total) / sum(weight) over sequences, float64 (B,) each; ``exp``: e to the power of it."""

    def statistic(draws: Tensor) -> Tensor:
        mean = total[draws].sum(-1) / weight[draws].sum(-1)
        return mean.exp() if exp else mean

    value = float(statistic(torch.arange(len(total))))
    return Metric(value, *(interval(statistic, len(total), seed) or ()))


def _median(values: Tensor, seed: int) -> Metric:
    return Metric(
        float(values.quantile(0.5)),
        *(interval(lambda draws: values[draws].quantile(0.5, dim=-1), len(values), seed) or ()),
    )
