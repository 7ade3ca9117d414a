"""Further figures of ``--preset cpu-targets``: call overhead, odd shapes, group sizes, zero points, thread scaling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..weights.scheme import Scheme, numbers_of
from .contestants import COLD_CACHES, Contestant, LayerMaker, Site, WrongKernelError
from .goal_tables import CPU
from .goals import word
from .machine import last_level_cache
from .results import NAMES
from .run import draw, verify
from .shapes import Shape
from .timing import Runner, in_turns

SCHEMES = ("w4a8g128", "w4a16g128", "w8a8", "w8a16")
SMALL, LARGE = (64, 64), (4096, 4096)
# (odd shape, similar round shape, M), all with more than 10^7 multiply-adds
ODD = (
    ((4095, 4097), LARGE, 1),
    ((4095, 4097), LARGE, 256),
    ((33, 4096), (32, 4096), 256),
    ((4096, 70), (4096, 64), 256),
)
# For a whole model: quantity -> smallest value, and smallest ratio to torch bf16.
MODEL = "nybble w4a8g128"
MODEL_BASELINE = "torch bf16"
MODEL_LEAST = {"decode_tokens_s": (60.0, 4.0), "prefill_tokens_s": (1000.0, 2.0)}
MOST_OVERHEAD_US, MOST_ODD, MOST_GROUPS, MOST_ASYMMETRIC, LEAST_SCALING = 5.0, 1.15, 1.15, 1.10, 1.85


@dataclass(frozen=True)
class Figure:
    """A measured value and its bound. Ratios are ratios of times. topic: figures of one are shown as one, the worst."""

    name: str
    value: float
    unit: str
    bound: float
    at_most: bool = True
    topic: str | None = None

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def line(self) -> dict[str, Any]:
        """The figure as a result line."""
        return {"kind": "figure", **asdict(self), "met": self.met}

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Figure:
        """The figure from a result line."""
        return cls(**{field.name: line[field.name] for field in fields(cls) if field.name in line})

    @property
    def slack(self) -> float:
        """How far it is from its bound: below 1 it is missed."""
        return self.bound / self.value if self.at_most else self.value / self.bound

    @property
    def reached(self) -> str:
        """Its value, bound and result."""
        sign = "<=" if self.at_most else ">="
        return f"{self.value:.3g}{self.unit} ({sign} {self.bound:g}{self.unit}) {word(self.met)}"

    def __str__(self) -> str:
        return f"{self.name}: {self.reached}"


def worst(rows: Iterable[Mapping[str, Any]]) -> dict[str, Figure]:
    """Of each topic of the result lines, the figure that is the nearest to its bound, or beyond it."""
    found: dict[str, Figure] = {}
    for figure in (Figure.of(row) for row in rows if row.get("kind") == "figure"):
        if figure.topic is not None:
            found[figure.topic] = min(figure, found.get(figure.topic, figure), key=lambda one: one.slack)
    return found


Case = tuple[str, Shape]


def duel(cases: Sequence[Case], m: int, dtype: torch.dtype, cache: str, budget_s: float) -> list[float]:
    """Median seconds of a layer for each (scheme, shape), timed in turns, after checking each.

    Raises:
        WrongKernelError: an output differs from the reference by more than its error bound.
    """
    copied = COLD_CACHES * last_level_cache() if cache == "cold" else 0
    with torch.inference_mode():
        runners = [Runner(_checked(case, m, dtype, copied)) for case in cases]
        timings, _ = in_turns(runners, budget_s)
    return [timing.median for timing in timings]


def _checked(case: Case, m: int, dtype: torch.dtype, copied: int) -> Any:
    scheme, shape = case
    weight, x = draw(shape, m)
    contestant: Contestant = LayerMaker(Scheme.parse(scheme)).make(Site(weight, dtype, copied))
    complaint = verify(contestant, x, (m,))
    if complaint is not None:
        raise WrongKernelError(f"{contestant.name} n={shape[0]} k={shape[1]} {complaint}; not timed")
    return contestant.bind(x.to(dtype))


def overhead(budget_s: float) -> Iterator[Figure]:
    """Time of a module call on one token with a layer so small that the time is all overhead."""
    for dtype in (torch.float32, torch.bfloat16):
        seconds = duel([(scheme, SMALL) for scheme in SCHEMES], 1, dtype, "hot", budget_s)
        for scheme, value in zip(SCHEMES, seconds, strict=True):
            yield Figure(f"64x64 M=1 {NAMES[dtype]} {scheme}, module call", value * 1e6, " us", MOST_OVERHEAD_US)


def odd(budget_s: float) -> Iterator[Figure]:
    """Time per operation of odd shapes over that of similar round shapes, with weights in the cache."""
    for shape, neighbour, m in ODD:
        cases = [(scheme, size) for scheme in SCHEMES for size in (shape, neighbour)]
        seconds = duel(cases, m, torch.bfloat16, "hot", budget_s)
        work = (neighbour[0] * neighbour[1]) / (shape[0] * shape[1])
        for i, scheme in enumerate(SCHEMES):
            ratio = seconds[2 * i] / seconds[2 * i + 1] * work
            name = f"{shape[0]}x{shape[1]} over {neighbour[0]}x{neighbour[1]} M={m} {scheme}, per operation"
            yield Figure(name, ratio, "x", MOST_ODD)


def groups(budget_s: float) -> Iterator[Figure]:
    """Time of the slowest group size over the fastest, and of asymmetric over symmetric, with cold weights."""
    for family in ("w4a8", "w4a16"):
        sizes = [family, *(f"{family}g{size}" for size in numbers_of(family)[0].group_sizes if size >= 32)]
        schemes = [*sizes, f"{family}g128asym"]
        for m in CPU.ms:
            seconds = duel([(scheme, LARGE) for scheme in schemes], m, torch.bfloat16, "cold", budget_s)
            times = dict(zip(schemes, seconds, strict=True))
            slow, fast = (pick(sizes, key=times.__getitem__) for pick in (max, min))
            yield Figure(
                f"{slow} over {fast} (slowest, fastest group) M={m}", times[slow] / times[fast], "x", MOST_GROUPS
            )
            ratio = times[f"{family}g128asym"] / times[f"{family}g128"]
            yield Figure(f"{family}g128 asymmetric over symmetric M={m}", ratio, "x", MOST_ASYMMETRIC)


def scaling(budget_s: float) -> Iterator[Figure]:
    """Time with one thread over two, M=256, with cold weights."""
    before = torch.get_num_threads()
    times = {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            times[threads] = duel([(scheme, LARGE) for scheme in SCHEMES], 256, torch.bfloat16, "cold", budget_s)
    finally:
        torch.set_num_threads(before)
    for scheme, one, two in zip(SCHEMES, times[1], times[2], strict=True):
        yield Figure(f"{scheme} M=256, 1 thread over 2", one / two, "x", LEAST_SCALING, at_most=False)


def model(rows: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """The figures for results of ``--model``, if the models that they name ran."""
    by_name = {row["contestant"]: row for row in rows}
    for quantity, (least, ratio) in MODEL_LEAST.items():
        if MODEL in by_name:
            name = quantity.removesuffix("_tokens_s")
            value = by_name[MODEL][quantity]
            yield Figure(f"{MODEL}, {name}", value, " tokens/s", least, at_most=False)
            if MODEL_BASELINE in by_name:
                over = value / by_name[MODEL_BASELINE][quantity]
                yield Figure(f"{MODEL}, {name} over {MODEL_BASELINE}", over, "x", ratio, at_most=False)


FIGURES = (overhead, odd, groups, scaling)
