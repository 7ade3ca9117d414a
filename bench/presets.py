"""``--preset``: fixed runs that report whether performance targets are met."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..dispatch import targets
from ..weights.sparsity import NofM
from . import accuracy as language
from . import crossover, sparse_goals
from .contestants import Maker, PeerMaker, chosen, each_layout, layer_makers, peer_makers
from .figures import FIGURES, LARGE, SCHEMES, Figure
from .goals import MS, checks, table
from .peers import Peer
from .peers.torch_dense import BF16, FP32
from .results import Row
from .run import Grid, race
from .shapes import SETS, Shape
from .weights import WeightKind

THREADS = 2
DTYPE = torch.bfloat16
# Seconds of timing for a figure: with few contestants, less is needed than for a cell with all peers.
FIGURE_BUDGET_S = 2.0
AVX2 = {"NYBBLE_TARGET": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}
LEAST_AVX2_SPEEDUP, LEAST_AVX2_MEMORY = 2.5, 0.85

Put = Callable[[Sequence[Row]], None]


@dataclass(frozen=True)
class Setup:
    """Arguments of a preset.

    shapes: for presets without fixed shapes. budget_s: seconds of timing per cell. put: outputs result lines. advance:
    called after each cell. done: result lines of an interrupted run. only: globs that restrict what runs.
    """

    peers: Sequence[Peer]
    shapes: Sequence[Shape]
    budget_s: float
    ceilings: dict[str, Any]
    put: Put
    advance: Callable[[str], None]
    done: Sequence[Row] = ()
    only: Sequence[str] = ()


def cpu_targets(setup: Setup) -> Iterator[str]:
    """Times nybble's layers against the peers; yields the table of targets, then each other figure."""
    makers = [*layer_makers(SCHEMES), *peer_makers(setup.peers, ())]
    found = checks(_results(makers, _grid(SETS["targets"], MS, setup), setup))
    setup.put([checked.line() for checked in found])
    yield table(found)
    for figures in FIGURES:
        for figure in figures(FIGURE_BUDGET_S):
            setup.put([figure.line()])
            yield str(figure)
        setup.advance(figures.__name__)


def avx2_targets(setup: Setup) -> Iterator[str]:
    """Times nybble's w8a8 and torch fp32, both limited to AVX2; yields each figure."""
    fp32 = [PeerMaker(peer) for peer in setup.peers if peer.name == FP32]
    rows = _results([*layer_makers(["w8a8"]), *fp32], _grid([LARGE], (1, 256), setup), setup)
    for figure in _avx2_figures(rows):
        setup.put([figure.line()])
        yield str(figure)


def sparse_targets(setup: Setup) -> Iterator[str]:
    """Times sparse kernels against nybble's dense ones and the peers; yields the table of targets."""
    kernels = [chosen(kind, DTYPE) for kind in (*sparse_goals.BASELINES, *sparse_goals.KINDS)]
    sparse_peers = [peer for peer in setup.peers if peer.sparse or peer.name == BF16]
    makers: list[Maker] = [
        *kernels,
        *peer_makers(sparse_peers, [kernel.kind for kernel in kernels if _with_peers(kernel.kind)]),
    ]
    rows = _results(makers, _grid(sparse_goals.SHAPES, sparse_goals.MS, setup), setup)
    setup.put([checked.line() for checked in sparse_goals.checks(rows)])
    yield sparse_goals.table(rows)


def accuracy(setup: Setup) -> Iterator[str]:
    """Measures the losses of all methods on the language model; yields the table and each target."""
    yield from language.accuracy(setup.put, setup.advance, setup.done, setup.only)


def _with_peers(kind: WeightKind) -> bool:
    """Whether sparse peers are timed too: they are slow, and N:M patterns would repeat the unstructured result."""
    return not isinstance(kind.scheme.sparsity, NofM)


def sparse_crossover(setup: Setup) -> Iterator[str]:
    """Times each series of sparse weights against dense kernels and torch bf16; yields the crossover table."""
    dense: list[Maker] = [chosen(crossover.INT8, DTYPE), chosen(crossover.INT4, DTYPE)]
    dense += [PeerMaker(peer) for peer in setup.peers if peer.name == BF16]
    grid = _grid(setup.shapes, crossover.MS, setup)
    rows = []
    for series, kinds in crossover.SERIES.items():
        makers = [*dense, *(maker for kind in kinds for maker in each_layout(kind))]
        rows += _results(makers, grid, setup, {"series": series})
    yield crossover.table(crossover.maps(rows))


def _results(makers: Sequence[Maker], grid: Grid, setup: Setup, mark: Row | None = None) -> list[Row]:
    """The results of a race. Outputs all lines as they come, each extended by `mark`."""
    rows = []
    for lines in race(makers, grid, setup.ceilings, setup.advance):
        marked = [{**line, **(mark or {})} for line in lines]
        setup.put(marked)
        rows += [line for line in marked if line["kind"] == "result"]
    return rows


def _avx2_figures(rows: Sequence[Row]) -> Iterator[Figure]:
    us = {(row["contestant"], row["m"]): row["us"] for row in rows}
    if (FP32, 256) in us:
        ratio = us[FP32, 256] / us["nybble w8a8", 256]
        yield Figure("avx2 w8a8 4096x4096 M=256 over torch fp32", ratio, "x", LEAST_AVX2_SPEEDUP, at_most=False)
    (one,) = (row for row in rows if row["scheme"] == "w8a8" and row["m"] == 1)
    yield Figure(
        "avx2 w8a8 4096x4096 M=1, share of the read speed", one["roofline"], "", LEAST_AVX2_MEMORY, at_most=False
    )


def _grid(shapes: Sequence[Shape], ms: Sequence[int], setup: Setup) -> Grid:
    return Grid(shapes, ms, (DTYPE,), (THREADS,), ("cold",), setup.budget_s)


def hold_to_avx2(argv: Sequence[str]) -> None:
    """Restarts this process with nybble and torch limited to AVX2 by environment variables; returns if they are set."""
    if any(os.environ.get(name) != value for name, value in AVX2.items()):
        command = [sys.executable, "-m", "nybble.bench", *argv]
        os.execve(sys.executable, command, {**os.environ, **AVX2})  # noqa: S606 (this program itself)
    if targets.detect().targets[-1] != "avx2":
        raise ValueError("--preset avx2-targets: this CPU has no AVX2")


# Name -> (function that runs it, number of progress steps for given shapes and globs).
PRESETS: dict[str, tuple[Callable[[Setup], Iterator[str]], Callable[[Sequence[Shape], Sequence[str]], int]]] = {
    "cpu-targets": (cpu_targets, lambda *_: len(SETS["targets"]) * len(MS) + len(FIGURES)),
    "avx2-targets": (avx2_targets, lambda *_: 2),
    "sparse-targets": (sparse_targets, lambda *_: len(sparse_goals.SHAPES) * len(sparse_goals.MS)),
    "sparse-crossover": (
        sparse_crossover,
        lambda shapes, _: len(shapes) * len(crossover.MS) * len(crossover.SERIES),
    ),
    "accuracy": (accuracy, lambda _, only: language.steps(only)),
}
