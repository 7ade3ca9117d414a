"""``--model``: decode and prefill speed and memory of whole models.

Each model runs in its own process, so that peak memory is its own, and the models take turns (A B A B), so that drift of
the machine's speed affects all equally.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluate.memory import held_bytes, peak_mb
from .apart import apart
from .llama import CONTESTANTS, SHAPE
from .outside import op_ms, without_linears

PROMPT, STEPS, PREFILL = 16, 32, 256
PREFILL_RUNS = 5
TURNS = 2


@dataclass(frozen=True)
class ModelResult:
    """Results of one model with batch size 1. Megabytes are 10^6 bytes.

    decode_tokens_s: greedy decoding after a prompt of 16 tokens, from the median step.
    prefill_tokens_s: 256 tokens at once, with logits for the last token only.
    peak_mb: peak memory of the process while running. build_mb: the same while building the model.
    weights_mb: parameters and buffers.
    decode_outside_ms, prefill_outside_ms: time outside linear layers. decode_ops, prefill_ops: the operations there.
    """

    contestant: str
    threads: int
    decode_tokens_s: float
    prefill_tokens_s: float
    peak_mb: float
    build_mb: float
    weights_mb: float
    decode_outside_ms: float
    prefill_outside_ms: float
    decode_ops: dict[str, float]
    prefill_ops: dict[str, float]
    kind: str = "model"


def _ids(tokens: int) -> Tensor:
    return torch.randint(int(SHAPE["vocab_size"]), (1, tokens), generator=torch.Generator().manual_seed(0))


def _forward(model: Any, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """The logits of the last position, and the cache. Does not use `logits_to_keep`: its strided slice makes torch copy
    the whole weight of a dense head at every call, which would distort the comparison."""
    out = model.model(ids, past_key_values=cache, use_cache=True)
    return model.lm_head(out.last_hidden_state[:, -1]), out.past_key_values


def decode_steps(model: nn.Module, steps: int = STEPS) -> list[float]:
    """Seconds of each greedy decoding step after the prompt: argmax and forward call."""
    logits, cache = _forward(model, _ids(PROMPT))
    seconds = []
    for _ in range(steps):
        start = perf_counter()
        logits, cache = _forward(model, logits.argmax(-1, keepdim=True), cache)
        seconds.append(perf_counter() - start)
    return seconds


def prefill_runs(model: nn.Module, runs: int = PREFILL_RUNS) -> list[float]:
    """Seconds of each forward call with PREFILL tokens and an empty cache."""
    ids, seconds = _ids(PREFILL), []
    for _ in range(runs):
        start = perf_counter()
        _forward(model, ids)
        seconds.append(perf_counter() - start)
    return seconds


def _speeds(model: nn.Module) -> tuple[float, float]:
    """Median seconds of a decode step and of a prefill."""
    decode_steps(model, 2)
    prefill_runs(model, 1)
    return median(decode_steps(model)), median(prefill_runs(model))


def measure(contestant: str, threads: int) -> ModelResult:
    """Builds and times one model in this process."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        model = CONTESTANTS[contestant]()
        build_mb = peak_mb(reset=True)
        decode, prefill = _speeds(model)
        most_mb = peak_mb()
        with without_linears(model):
            decode_outside, prefill_outside = _speeds(model)
            decode_ops = op_ms(lambda: decode_steps(model), STEPS)
            prefill_ops = op_ms(lambda: prefill_runs(model, 1), 1)
    return ModelResult(
        contestant=contestant,
        threads=threads,
        decode_tokens_s=1 / decode,
        prefill_tokens_s=PREFILL / prefill,
        peak_mb=most_mb,
        build_mb=build_mb,
        weights_mb=held_bytes(model) / 1e6,
        decode_outside_ms=decode_outside * 1e3,
        prefill_outside_ms=prefill_outside * 1e3,
        decode_ops=decode_ops,
        prefill_ops=prefill_ops,
    )


def _best(results: Sequence[ModelResult]) -> ModelResult:
    """The best of each speed, and the largest of each memory figure."""
    return replace(
        min(results, key=lambda r: r.decode_outside_ms),
        decode_tokens_s=max(r.decode_tokens_s for r in results),
        prefill_tokens_s=max(r.prefill_tokens_s for r in results),
        prefill_outside_ms=min(r.prefill_outside_ms for r in results),
        peak_mb=max(r.peak_mb for r in results),
        build_mb=max(r.build_mb for r in results),
    )


def run(pattern: str, threads: int, turns: int = TURNS) -> Iterator[ModelResult]:
    """Measures all models whose name matches the glob, `turns` times in turns.

    Raises:
        ImportError: transformers is not installed.
        ValueError: nothing matches.
        ChildProcessError: a model's process died.
    """
    if find_spec("transformers") is None:
        raise ImportError("the model bench needs transformers: pip install transformers")
    names = [name for name in CONTESTANTS if fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(f"--model {pattern!r}: matches none of {', '.join(CONTESTANTS)}")
    rounds = [[apart(measure, name, threads) for name in names] for _ in range(turns)]
    for results in zip(*rounds, strict=True):
        yield _best(results)
