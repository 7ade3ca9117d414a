"""`nybble.evaluate`: run a model and its reference on the same batches and compute metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..dispatch.targets import detect
from ..model.bar import bar
from ..model.batches import call
from ..model.options import check_choice, check_progress
from ..model.stages import eval_mode
from .data import ON_BAD, Batches, sequences, sift
from .memory import has_peak, held_bytes, peak_mb
from .result import Evaluation, Metric
from .table import COMPARED, OURS, THEIRS, Table, Task

NAMES = ("perplexity", "kl", "cosine", "latency", "memory", "bytes")


def evaluate(
    model: nn.Module,
    reference: nn.Module | None,
    data: Iterable[Any],
    metrics: str | Task | Sequence[str | Task] = NAMES,
    *,
    seed: int = 0,
    on_bad: str = "error",
    progress: bool | None = None,
) -> Evaluation:
    """Measure a model and compare it with a reference, usually the original model.

    Both run in eval mode and without a KV cache; neither is changed. The outputs of one batch are held at a time.

    Args:
        model, reference: modules that take the same batches; reference may be None.
        data: batches, each a tensor, a tuple (positional arguments) or a dict (keyword arguments). Tokens outside
            ``attention_mask`` are ignored.
        metrics: names from the list below, or functions ``f(output, batch)`` that return a number, or one per sequence
            (B,). The metric is their mean; it has the function's name, for the reference with the prefix ``reference_``.

            * ``"perplexity"`` (needs token ids and logits): ``perplexity``, ``reference_perplexity``, and
              ``delta_ln_ppl``, the difference of their logarithms.
            * ``"kl"``: KL(reference || model) of the softmax of the output, in nats per token.
            * ``"cosine"``: cosine similarity of the outputs, mean over tokens.
            * ``"latency"``: ``latency_ms`` and ``reference_latency_ms``, the median time of a batch, measured in turns,
              and ``speedup``.
            * ``"memory"``: ``peak_mb``, the peak memory of the whole process (10^6 bytes) while the model runs on the
              first batch.
            * ``"bytes"``: ``nbytes`` and ``reference_nbytes`` of parameters and buffers.
        seed: of the bootstrap intervals.
        on_bad: what to do with batches that are empty, hold NaN or Inf, or have other keys than the first: ``"error"``
            raises, ``"skip"`` skips and counts them.
        progress: True shows a bar on stderr, False none. None (default): a bar if stderr is a terminal and the work takes
            longer than two seconds. Bars need the package rich.

    Returns:
        An ``Evaluation``: each metric with its 95 % interval over sequences (for times, over batches).

    Raises:
        TypeError, ValueError: an argument is wrong, or a metric does not fit the model's output.
    """
    names, tasks = _check_metrics(metrics, reference)
    check_choice("on_bad", on_bad, ON_BAD)
    check_progress(progress)
    for argument, module in (("model", model), ("reference", reference)):
        if not (isinstance(module, nn.Module) or (module is None and argument == "reference")):
            raise TypeError(f"{argument}={type(module).__name__}: must be a torch.nn.Module")
    batches = sift(data, model, on_bad)
    models = {OURS: model} if reference is None else {OURS: model, THEIRS: reference}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for module in models.values():
            stack.enter_context(eval_mode(module))
        table = Table(names, tasks)
        with bar(len(batches.kept), progress) as advance:
            for i, batch in enumerate(list(batches.kept)):
                table.add(batch, models, warm_up=i == 0)
                advance(f"batch {i + 1}")
        found = table.metrics(seed)
        if "memory" in names:
            peak_mb(reset=True)
            call(model, batches.kept[0])
            found["peak_mb"] = Metric(peak_mb())
    if "bytes" in names:
        found |= {f"{prefix}nbytes": Metric(float(held_bytes(module))) for prefix, module in models.items()}
    return _evaluation(found, batches)


def _evaluation(found: dict[str, Metric], batches: Batches) -> Evaluation:
    count = sum(map(sequences, batches.kept))
    return Evaluation(found, len(batches.kept), count, batches.skipped, detect().cpu, torch.get_num_threads())


def _check_metrics(
    metrics: str | Task | Sequence[str | Task], reference: nn.Module | None
) -> tuple[tuple[str, ...], dict[str, Task]]:
    """The names, and the functions by name. Raises ValueError."""
    asked = (metrics,) if isinstance(metrics, str) or callable(metrics) else tuple(metrics)
    names = [check_choice("metrics", metric, NAMES) for metric in asked if not callable(metric)]
    tasks = {str(getattr(metric, "__name__", type(metric).__name__)): metric for metric in asked if callable(metric)}
    if not asked or len(set(names)) + len(tasks) != len(asked):
        raise ValueError(f"metrics={metrics!r}: must be at least one name or function, without duplicate names")
    if reference is None:
        names = [name for name in names if name not in COMPARED or metrics is not NAMES]
        for name in COMPARED:
            if name in names:
                raise ValueError(f"metrics={name!r}, reference=None: needs a reference to compare with")
    if "memory" in names and not has_peak():
        if metrics is not NAMES:
            raise ValueError("metrics='memory': this system does not report the peak memory of a process")
        names.remove("memory")
    return tuple(names), tasks
