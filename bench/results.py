"""Result lines from timings: rates, share of the roofline, speed over other contestants of the cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .ceilings import PEAKS
from .contestants import Contestant
from .machine import last_level_cache
from .peers.torch_dense import BF16
from .timing import NOISY_ABOVE, Timing

Row = dict[str, Any]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Cell:
    """The common parameters of the results timed together. cache: "cold" or "hot"."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    threads: int
    cache: str

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.n}x{self.k} m={self.m} {NAMES[self.dtype]} {threads} {self.cache}"


def cell_of(row: Mapping[str, Any]) -> str:
    """The name of a result's cell."""
    names = ("m", "n", "k", "threads", "cache")
    return str(Cell(**{name: row[name] for name in names}, dtype=DTYPES[row["dtype"]]))


def rows_of(
    cell: Cell, contestants: Sequence[Contestant], timings: Sequence[Timing], spread: float, limits: Mapping[str, float]
) -> list[Row]:
    """One result per contestant of a cell. limits: the ceilings for its threads, and read_gbps (see run.reading)."""
    seconds = {contestant.name: timing.median for contestant, timing in zip(contestants, timings, strict=True)}
    rows = []
    for contestant, timing in zip(contestants, timings, strict=True):
        peers = [e.name for e in contestants if e.peer and _comparable(contestant, e)]
        best = min(peers, key=seconds.__getitem__, default=None)
        rows.append(
            {
                "kind": "result",
                "contestant": contestant.name,
                "peer": contestant.peer,
                "scheme": contestant.scheme,
                "weight_bits": contestant.weight_bits,
                "dtype": NAMES[cell.dtype],
                "takes": NAMES[contestant.dtype],
                "m": cell.m,
                "n": cell.n,
                "k": cell.k,
                "threads": cell.threads,
                "cache": cell.cache,
                **_speed(cell, contestant, timing, limits),
                "spread": round(spread, 4),
                "noisy": spread > NOISY_ABOVE,
                "rounds": timing.rounds,
                "vs_bf16": _ratio(seconds.get(BF16), timing.median),
                "best_peer": best,
                "vs_peer": _ratio(seconds[best] if best else None, timing.median),
                **_over_dense(
                    cell, contestant, timing, [p for p in zip(contestants, timings, strict=True) if not p[0].peer]
                ),
            }
        )
    return rows


def _comparable(contestant: Contestant, peer: Contestant) -> bool:
    """Whether a peer has the same weight width or, for sparse weights, the same pattern."""
    return peer.pattern == contestant.pattern and (
        contestant.pattern is not None or peer.weight_bits == contestant.weight_bits
    )


def _over_dense(cell: Cell, contestant: Contestant, timing: Timing, ours: Sequence[tuple[Contestant, Timing]]) -> Row:
    """For sparse weights: speed over nybble's fastest dense kernel of the same width, and the ratio of bytes moved."""
    pattern = None if contestant.pattern is None else str(contestant.pattern)
    row = {"pattern": pattern, "kept": round(contestant.kept, 6), "vs_dense": None, "bytes_vs_dense": None}
    dense = [(found, e) for e, found in ours if e.scheme == contestant.dense]
    if contestant.dense is None or not dense:
        return row
    fastest, other = min(dense, key=lambda pair: pair[0].median)
    gain = round(_moved(cell, other) / _moved(cell, contestant), 4)
    return {**row, "vs_dense": _ratio(fastest.median, timing.median), "bytes_vs_dense": gain}


def _moved(cell: Cell, contestant: Contestant) -> int:
    """Bytes of the weight, activations and output together."""
    return contestant.weight_bytes + cell.m * (cell.n + cell.k) * contestant.dtype.itemsize


def _speed(cell: Cell, contestant: Contestant, timing: Timing, limits: Mapping[str, float]) -> Row:
    """Microseconds, bytes moved, rates (operations of nonzero weights), and share of the roofline."""
    moved = _moved(cell, contestant)
    operations = round(2 * cell.m * cell.n * cell.k * contestant.kept)
    bound, bound_us = roofline(limits, contestant.multiply, moved, operations, cell.cache)
    us, p10, p90 = (round(seconds * 1e6, 3) for seconds in (timing.median, timing.p10, timing.p90))
    return {
        "us": us,
        "us_p10": p10,
        "us_p90": p90,
        "bytes": moved,
        "gbps": round(moved / us / 1e3, 2),
        "gops": round(operations / us / 1e3, 1),
        "multiply": contestant.multiply,
        "peak": limits[PEAKS[contestant.multiply]],
        "bound": bound,
        "roofline": round(bound_us / us, 4),
        "read_gbps": limits.get("read_gbps"),
    }


def roofline(limits: Mapping[str, float], multiply: str, moved: int, operations: int, cache: str) -> tuple[str, float]:
    """The binding limit, "memory" or "compute", and the shortest time in microseconds that it allows.

    The memory limit is the last-level cache's bandwidth if the data is hot and fits; else the read bandwidth measured
    during the race, or that of the probes if there was none.
    """
    probed = max(limits["dram_gbps"], limits["dram_huge_gbps"])
    cached = cache == "hot" and moved <= last_level_cache()
    reads = limits["l3_gbps"] if cached else limits.get("read_gbps", probed)
    memory = moved / reads / 1e3
    compute = operations / limits[PEAKS[multiply]] / 1e3
    return ("memory", memory) if memory >= compute else ("compute", compute)


def _ratio(baseline: float | None, seconds: float) -> float | None:
    return None if baseline is None else round(baseline / seconds, 4)
