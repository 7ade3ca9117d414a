"""Races: builds the contestants of each shape, checks their outputs, then times them in turns, cell by cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .ceilings import peaks
from .contestants import COLD_CACHES, Contestant, Maker, NotHereError, Site, WrongKernelError
from .machine import last_level_cache
from .peers.peer import OPENMP
from .results import NAMES, Cell, Row, rows_of
from .shapes import Shape
from .timing import Call, Runner, in_turns


@dataclass(frozen=True)
class Grid:
    """The cells to run: all combinations whose names are `wanted`. budget_s: seconds of timing per cell, without warm-up."""

    shapes: Sequence[Shape]
    ms: Sequence[int]
    dtypes: Sequence[torch.dtype]
    threads: Sequence[int]
    caches: Sequence[str]
    budget_s: float
    wanted: Callable[[str], bool] = lambda _: True

    @property
    def cells(self) -> int:
        sizes = (self.shapes, self.ms, self.dtypes, self.threads, self.caches)
        count = 1
        for size in sizes:
            count *= len(size)
        return count

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether a line is a result of one of the cells."""
        return (
            row["kind"] == "result"
            and (row["n"], row["k"]) in self.shapes
            and (row["m"], row["cache"], row["threads"]) in product(self.ms, self.caches, self.threads)
            and row["dtype"] in map(NAMES.__getitem__, self.dtypes)
        )


def race(
    makers: Sequence[Maker],
    grid: Grid,
    ceilings: Mapping[str, Any],
    advance: Callable[[str], None] = lambda label: None,
) -> Iterator[list[Row]]:
    """Yields the result lines of each cell; before them, for each shape, the contestants that cannot run, with the reason.

    ceilings: of this machine, for all thread counts of the grid; those of multiplies are measured anew before and after each
    cell, because cores that are shared with other machines change their speed. advance: called after each cell with its name.

    Raises:
        WrongKernelError: a kernel of nybble exceeds its error bound. Nothing of its shape is timed.
    """
    before = torch.get_num_threads()
    try:
        # Most threads first: a thread pool created with few does not grow.
        for threads, shape, dtype in product(sorted(grid.threads, reverse=True), grid.shapes, grid.dtypes):
            torch.set_num_threads(threads)
            yield from _race_shape(makers, grid, ceilings, (threads, shape, dtype), advance)
    finally:
        torch.set_num_threads(before)


def _race_shape(
    makers: Sequence[Maker],
    grid: Grid,
    ceilings: Mapping[str, Any],
    where: tuple[int, Shape, torch.dtype],
    advance: Callable[[str], None],
) -> Iterator[list[Row]]:
    threads, (n, k), dtype = where
    cells = [Cell(m, n, k, dtype, threads, cache) for cache, m in product(grid.caches, grid.ms)]
    wanted = [cell for cell in cells if grid.wanted(str(cell))]
    if not wanted:
        for cell in cells:
            advance(str(cell))
        return
    weight, x = draw((n, k), max(grid.ms))
    cold = COLD_CACHES * last_level_cache() if "cold" in grid.caches else 0
    with torch.inference_mode():
        site = Site(weight, dtype, cold)
        contestants, skips = _enter(makers, site, x, grid.ms)
        yield skips
        read_bytes, reads = reading(site, contestants[0].weight_bytes)
        for cell in cells:
            if cell in wanted:
                calls = [contestant.bind(x[: cell.m].to(contestant.dtype)) for contestant in contestants]
                limits = {**ceilings["threads"][str(threads)], **peaks(threads)}
                runners = [
                    Runner(each if cell.cache == "cold" else each[:1], contestant.pool)
                    for each, contestant in zip(calls, contestants, strict=True)
                ]
                if cell.cache == "cold":
                    runners.append(Runner(reads, OPENMP))
                timings, spread = in_turns(runners, grid.budget_s)
                limits |= {name: round(max(rate, limits[name]), 1) for name, rate in peaks(threads).items()}
                if cell.cache == "cold":
                    limits["read_gbps"] = round(read_bytes / timings.pop().median / 1e9, 2)
                yield rows_of(cell, contestants, timings, spread, limits)
            advance(str(cell))


def reading(site: Site, weight_bytes: int) -> tuple[int, list[Call]]:
    """A byte count close to a weight's, and calls that only read as many, from many copies: they measure the memory
    bandwidth during the race. On a shared virtual machine it changed from 66 to 47 GB/s within a minute."""
    words = max(1, weight_bytes // 8)
    # Ones, not zeros: untouched zero pages all map to one page.
    return 8 * words, [torch.ones(words, dtype=torch.int64).amax for _ in range(site.copies(8 * words))]


def draw(shape: Shape, m: int) -> tuple[Tensor, Tensor]:
    """Normal float32 weight (N, K) and activations (M, K), always the same, with outputs of unit variance."""
    n, k = shape
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, k, generator=generator) / k**0.5, torch.randn(m, k, generator=generator)


def _enter(
    makers: Sequence[Maker], site: Site, x: Tensor, ms: Sequence[int]
) -> tuple[list[Contestant], list[dict[str, str]]]:
    """The contestants with correct outputs, and skip lines for peers that cannot run or are wrong, with the reason."""
    contestants, skips = [], []
    for maker in makers:
        try:
            contestant = maker.make(site)
            complaint = verify(contestant, x, ms)
        except NotHereError as reason:
            skips.append({"kind": "skip", "contestant": maker.name, "reason": str(reason)})
            continue
        if complaint is None:
            contestants.append(contestant)
        elif contestant.peer:
            skips.append({"kind": "skip", "contestant": contestant.name, "reason": f"wrong: {complaint}"})
        else:
            raise WrongKernelError(
                f"{contestant.name} {contestant.scheme} n={site.n} k={site.k} {complaint}; not timed"
            )
    return contestants, skips


def verify(contestant: Contestant, x: Tensor, ms: Sequence[int]) -> str | None:
    """Checks a contestant's outputs for the first m rows of x, for each m; returns what is wrong, or None.

    Checks all columns of the first, middle and last row.
    """
    x = x.to(contestant.dtype)
    rows = sorted({row for m in ms for row in (0, m // 2, m - 1)})
    check = contestant.check(x[rows])
    for m in ms:
        y = torch.as_tensor(contestant.bind(x[:m])[0]())
        complaint = check(y[[row for row in rows if row < m]], m)
        if complaint is not None:
            return f"m={m}: {complaint}"
    return None
