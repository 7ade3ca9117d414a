"""Time the contestants in turns, and keep their outputs so that accuracy needs no second run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from .model import Batch, Encoder, embed
from .settle import settle


@dataclass(frozen=True)
class Plan:
    """How much to run. Budgets are seconds per contestant; the first round is always run."""

    sentences: int
    batches_per_round: int
    singles_per_round: int
    batch_budget_s: float
    single_budget_s: float
    rows: int = 32
    calibration: int = 0  # further sentences for calibration, or fewer if there are not enough

    @property
    def round_size(self) -> int:
        return self.rows * self.batches_per_round


FULL = Plan(sentences=2048, batches_per_round=2, singles_per_round=4, batch_budget_s=40, single_budget_s=8)
FULL_SPARSE = Plan(
    sentences=512, batches_per_round=2, singles_per_round=4, batch_budget_s=20, single_budget_s=4, calibration=1792
)
QUICK_SPARSE = Plan(
    sentences=64, batches_per_round=1, singles_per_round=2, batch_budget_s=2, single_budget_s=1, calibration=64
)
QUICK = Plan(sentences=192, batches_per_round=1, singles_per_round=3, batch_budget_s=6, single_budget_s=2)


@dataclass(frozen=True)
class Round:
    """The work of one round, the same for every contestant: padded batches, and some of their sentences one by one."""

    batches: list[Batch]
    singles: list[Batch]


@dataclass
class Track:
    """The results of one contestant: seconds of each round, and its vectors, fp32 [sentences, hidden]."""

    batch_s: list[float] = field(default_factory=list)
    single_s: list[float] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Accuracy:
    """Compared with fp32 on the same sentences: cosine of the vectors; top1: share with the same nearest neighbour."""

    mean_cosine: float
    worst_cosine: float
    top1: float


def make_rounds(encoder: Encoder, sentences: Sequence[str], plan: Plan) -> list[Round]:
    """Tokenise once, outside every timed loop; a last, short round is dropped."""
    rounds = []
    for start in range(0, len(sentences) - plan.round_size + 1, plan.round_size):
        part = sentences[start : start + plan.round_size]
        singles = encoder.tokenize(part[: plan.singles_per_round], 1)
        rounds.append(Round(encoder.tokenize(part, plan.rows), singles))
    return rounds


def _timed(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, list[Tensor]]:
    start = perf_counter()
    vectors = [embed(model, batch) for batch in batches]
    return perf_counter() - start, vectors


def _goes_on(spent: Sequence[float], done: int, budget_s: float) -> bool:
    """Whether no round was skipped so far and one more, as slow as the slowest, fits the budget."""
    return len(spent) == done and (not spent or sum(spent) + max(spent) <= budget_s)


def _warm_up(model: nn.Module, first: Round) -> None:
    """Run a quarter of a batch and a single sentence: enough to reach every kernel, and cheap for a slow dtype."""
    rows = max(1, len(first.batches[0]["input_ids"]) // 4)
    embed(model, {name: tensor[:rows] for name, tensor in first.batches[0].items()})
    embed(model, first.singles[0])


def measure(
    models: Mapping[str, nn.Module], rounds: Sequence[Round], plan: Plan, advance: Callable[[str], None]
) -> dict[str, Track]:
    """Run the contestants in turns, round after round, so that clock drift affects all of them alike.

    The first model is the reference: the run ends with the last round that fits its budget. `advance(name)` is called
    once for each contestant and round, outside the timed part.
    """
    tracks = {name: Track() for name in models}
    reference = next(iter(models))
    for model in models.values():
        _warm_up(model, rounds[0])
    for done, work in enumerate(rounds):
        if not _goes_on(tracks[reference].batch_s, done, plan.batch_budget_s):
            break
        for name, model in models.items():
            track = tracks[name]
            settle()
            if _goes_on(track.batch_s, done, plan.batch_budget_s):
                seconds, vectors = _timed(model, work.batches)
                track.batch_s.append(seconds)
                track.vectors.extend(vectors)
            if _goes_on(track.single_s, done, plan.single_budget_s):
                embed(model, work.singles[0])  # bring this contestant's weights back into the caches
                track.single_s.append(_timed(model, work.singles)[0])
            advance(name)
    return tracks


def speedup(track: Track, baseline: Track) -> float:
    """The median of baseline time / time at the large batch, over the rounds that both ran."""
    return median(b / t for t, b in zip(track.batch_s, baseline.batch_s, strict=False))


def _nearest(vectors: Tensor) -> Tensor:
    """Index of each row's nearest other row, int64 [rows]."""
    similarity = vectors @ vectors.T
    return similarity.fill_diagonal_(-2.0).argmax(dim=1)


def accuracy(track: Track, reference: Track) -> Accuracy:
    """Compare on the sentences that `track` ran; nearest neighbours are searched among these."""
    vectors = torch.cat(track.vectors)
    truth = torch.cat(reference.vectors)[: len(vectors)]
    cosine = (vectors * truth).sum(dim=1)
    same = (_nearest(vectors) == _nearest(truth)).float().mean()
    return Accuracy(cosine.mean().item(), cosine.min().item(), same.item())
