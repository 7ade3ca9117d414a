"""``--preset``: the runs that say which targets are met."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import targets
from .entrants import PeerMaker, layer_makers
from .figures import FIGURES, LARGE, SCHEMES, Figure
from .goals import MS, table, verdicts
from .peers import Peer
from .peers.torch_dense import FP32
from .results import Row
from .run import Grid, race
from .shapes import SETS

THREADS = 2
# Seconds that a race for a figure may time: few contestants need less than a cell full of peers.
FIGURE_BUDGET_S = 2.0
AVX2 = {"NYBBLE_TARGET": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}
LEAST_AVX2_SPEEDUP, LEAST_AVX2_MEMORY = 2.5, 0.85

Put = Callable[[Sequence[Row]], None]


@dataclass(frozen=True)
class Setup:
    """What a preset is given: the peers, seconds a cell may time, the ceilings, where lines go, and who is told of
    each cell that is done."""

    peers: Sequence[Peer]
    budget_s: float
    ceilings: dict[str, Any]
    put: Put
    advance: Callable[[str], None]


def cpu_targets(setup: Setup) -> Iterator[str]:
    """Races nybble's layers against the peers; yields the table of targets, then each other figure."""
    makers = [*layer_makers(SCHEMES), *(PeerMaker(peer) for peer in setup.peers)]
    rows = []
    for lines in race(makers, _grid(SETS["targets"], MS, setup), setup.ceilings, setup.advance):
        setup.put(lines)
        rows += [line for line in lines if line["kind"] == "result"]
    found = verdicts(rows)
    setup.put([verdict.line() for verdict in found])
    yield table(found)
    for figures in FIGURES:
        for figure in figures(FIGURE_BUDGET_S):
            setup.put([figure.line()])
            yield str(figure)
        setup.advance(figures.__name__)


def avx2_targets(setup: Setup) -> Iterator[str]:
    """nybble's w8a8 and torch fp32, both held to AVX2; yields each figure."""
    fp32 = [PeerMaker(peer) for peer in setup.peers if peer.name == FP32]
    rows = []
    for lines in race([*layer_makers(["w8a8"]), *fp32], _grid([LARGE], (1, 256), setup), setup.ceilings, setup.advance):
        setup.put(lines)
        rows += [line for line in lines if line["kind"] == "result"]
    for figure in _avx2_figures(rows):
        setup.put([figure.line()])
        yield str(figure)


def _avx2_figures(rows: Sequence[Row]) -> Iterator[Figure]:
    us = {(row["contestant"], row["m"]): row["us"] for row in rows}
    if (FP32, 256) in us:
        ratio = us[FP32, 256] / us["nybble w8a8", 256]
        yield Figure("avx2 w8a8 4096x4096 M=256 over torch fp32", ratio, "x", LEAST_AVX2_SPEEDUP, at_most=False)
    (one,) = (row for row in rows if row["scheme"] == "w8a8" and row["m"] == 1)
    yield Figure(
        "avx2 w8a8 4096x4096 M=1, share of the read speed", one["roofline"], "", LEAST_AVX2_MEMORY, at_most=False
    )


def _grid(shapes: Sequence[tuple[int, int]], ms: Sequence[int], setup: Setup) -> Grid:
    return Grid(shapes, ms, (torch.bfloat16,), (THREADS,), ("cold",), setup.budget_s)


def hold_to_avx2(argv: Sequence[str]) -> None:
    """Starts this process anew with nybble and torch held to AVX2, both of which read that once; returns if they are."""
    if any(os.environ.get(name) != value for name, value in AVX2.items()):
        command = [sys.executable, "-m", "nybble.bench", *argv]
        os.execve(sys.executable, command, {**os.environ, **AVX2})  # noqa: S606 (this program itself)
    if targets.detect().targets[-1] != "avx2":
        raise ValueError("--preset avx2-targets: this CPU has no AVX2")


# Name -> what runs it, and its steps for the progress bar.
PRESETS = {
    "cpu-targets": (cpu_targets, len(SETS["targets"]) * len(MS) + len(FIGURES)),
    "avx2-targets": (avx2_targets, 2),
}
