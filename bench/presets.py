"""``--preset``: fixed runs that report whether performance targets are met."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch

from ..dispatch import targets
from ..weights.sparsity import NofM
from . import accuracy as language
from . import crossover, held
from .attention import attention_figures, int8_figures
from .calls import call_figures
from .chain import chain_figures
from .contestants import Maker, PeerMaker, chosen, each_layout, layer_makers, peer_makers
from .encoder import cosines, over_bf16
from .figures import FIGURES as LAYER_FIGURES
from .figures import Figure
from .goal_tables import AMX, AVX2, CPU, FORMS, SPARSE
from .goals import Table, checks, show
from .peers import Peer
from .peers.torch_dense import BF16
from .quantizing import QUANTIZING
from .results import Row, cell_of
from .run import Grid, race
from .setup import THREADS, Setup
from .shapes import SETS, Shape
from .weights import WeightKind
from .whole.run import cells as whole_cells
from .whole.run import whole_models
from .whole.suites import MODULES, WHOLE

FIGURES = (*LAYER_FIGURES, *QUANTIZING, attention_figures, int8_figures, chain_figures, call_figures)
# Seconds of timing for a figure: with few contestants, less is needed than for a cell with all peers.
FIGURE_BUDGET_S = 2.0


def cpu_targets(setup: Setup) -> Iterator[str]:
    """Times nybble's layers against the peers; yields the table of targets, then each other figure."""
    rows = _results(_contestants(CPU, setup), _grid(CPU.shapes, CPU.ms, setup), setup)
    yield _table(CPU, rows, setup)
    yield from _figures(FIGURES, setup)


def avx2_targets(setup: Setup) -> Iterator[str]:
    """Times layers limited to AVX2, those of large models from memory, those of MiniLM from the cache; yields the table."""
    makers, dtype = _contestants(AVX2, setup), torch.float32
    small = SETS["minilm"]
    large = tuple(shape for shape in AVX2.shapes if shape not in small)
    grid = replace(_grid(large, AVX2.ms, setup), dtypes=(dtype,))
    rows = _results(makers, grid, setup)
    rows += _results(makers, replace(grid, shapes=small, caches=("hot",), budget_s=setup.budget_s / 2), setup)
    rows += _cosines(AVX2, setup)
    yield _table(AVX2, rows, setup)
    yield from _figures(QUANTIZING, setup)


def amx_targets(setup: Setup) -> Iterator[str]:
    """Times int8 layers on a CPU with AMX; yields the table of targets, and the speed of MiniLM."""
    yield _table(AMX, _results(_contestants(AMX, setup), _grid(AMX.shapes, AMX.ms, setup), setup), setup)
    if setup.wants("minilm"):
        for figure in over_bf16():
            setup.put([{**figure.line(), **setup.mark}])
            yield str(figure)
    setup.advance("minilm")
    yield from _figures(QUANTIZING, setup)


def needs_amx(_: Sequence[str]) -> None:
    """Refuses a machine without AMX.

    Raises:
        ValueError: nybble cannot use AMX here; the message says why.
    """
    machine = targets.detect()
    if "amx" not in machine.targets:
        raise ValueError(
            f"--preset amx-targets: this machine ({machine.cpu}) cannot run AMX kernels: {machine.missing['amx']}"
        )


def sparse_targets(setup: Setup) -> Iterator[str]:
    """Times sparse kernels against nybble's dense ones and the peers; yields the table of targets."""
    dense = dict.fromkeys(str(WeightKind.parse(kind).scheme.dense) for kind in SPARSE.schemes)
    kernels = [chosen(kind, torch.bfloat16) for kind in (*dense, *SPARSE.schemes)]
    sparse_peers = [peer for peer in setup.peers if peer.sparse or peer.name == BF16]
    makers: list[Maker] = [
        *kernels,
        *peer_makers(sparse_peers, [kernel.kind for kernel in kernels if _with_peers(kernel.kind)]),
    ]
    yield _table(SPARSE, _results(makers, _grid(SPARSE.shapes, SPARSE.ms, setup), setup), setup)


def form_targets(setup: Setup) -> Iterator[str]:
    """Times weights as other libraries have them (K-quants, 3 bits, NF4); yields the table of targets."""
    yield _table(FORMS, _results(_contestants(FORMS, setup), _grid(FORMS.shapes, FORMS.ms, setup), setup), setup)


def accuracy(setup: Setup) -> Iterator[str]:
    """Measures the losses of all methods on the language model; yields the table and each target."""
    yield from language.accuracy(setup.put, setup.advance, setup.done, setup.only)


def sparse_crossover(setup: Setup) -> Iterator[str]:
    """Times each series of sparse weights against dense kernels and torch bf16; yields the crossover table."""
    dense: list[Maker] = [chosen(crossover.INT8, torch.bfloat16), chosen(crossover.INT4, torch.bfloat16)]
    dense += [PeerMaker(peer) for peer in setup.peers if peer.name == BF16]
    grid = _grid(setup.shapes, crossover.MS, setup)
    rows = []
    for series, kinds in crossover.SERIES.items():
        makers = [*dense, *(maker for kind in kinds for maker in each_layout(kind))]
        rows += _results(makers, grid, replace(setup, mark={"series": series}))
    yield crossover.table(crossover.maps(rows))


def _with_peers(kind: WeightKind) -> bool:
    """Whether sparse peers are timed too: they are slow, and N:M patterns would repeat the unstructured result."""
    return not isinstance(kind.scheme.sparsity, NofM)


def _contestants(table: Table, setup: Setup) -> list[Maker]:
    """nybble's layers and the dense peers that the table names."""
    named = [peer for peer in setup.peers if any(fnmatchcase(peer.name, glob) for glob in table.peers)]
    return [*layer_makers(table.schemes), *peer_makers([peer for peer in named if peer.sparse is None], ())]


def _results(makers: Sequence[Maker], grid: Grid, setup: Setup) -> list[Row]:
    """The results and skips of a race, with the setup's mark. Cells that the interrupted run has are not run again."""
    old = [row for row in setup.done if setup.mark.items() <= row.items() and (row["kind"] == "skip" or grid.has(row))]
    finished = {cell_of(row) for row in old if row["kind"] == "result"}
    setup.put(old)
    rows = list(old)
    wanted = replace(grid, wanted=lambda cell: cell not in finished and setup.wants(cell))
    for lines in race(makers, wanted, setup.ceilings, setup.advance):
        marked = [{**line, **setup.mark} for line in lines]
        setup.put(marked)
        rows += marked
    return rows


def _table(table: Table, rows: Sequence[Row], setup: Setup) -> str:
    """The table as text; outputs the lines of its goals."""
    setup.put([checked.line() for checked in checks(table, rows)])
    return show(table, rows)


def _figures(runs: Sequence[Callable[[float], Iterator[Figure]]], setup: Setup) -> Iterator[str]:
    """Outputs the lines of the figures, measured with the preset's number of threads, and yields them as text."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        for run in runs:
            if setup.wants(run.__name__):
                for figure in run(FIGURE_BUDGET_S):
                    setup.put([{**figure.line(), **setup.mark}])
                    yield str(figure)
            setup.advance(run.__name__)
    finally:
        torch.set_num_threads(before)


def _cosines(table: Table, setup: Setup) -> list[Row]:
    schemes = dict.fromkeys(scheme for goal in table.goals if goal.least_cosine is not None for scheme in goal.schemes)
    known = [row for row in setup.done if row["kind"] == "cosine" and row["scheme"] in schemes]
    missing = [scheme for scheme in schemes if scheme not in {row["scheme"] for row in known}]
    rows = [*known, *(cosines(missing) if setup.wants("minilm") else ())]
    setup.put(rows)
    setup.advance("minilm")
    return rows


def _grid(shapes: Sequence[Shape], ms: Sequence[int], setup: Setup) -> Grid:
    return Grid(shapes, ms, (torch.bfloat16,), (THREADS,), ("cold",), setup.budget_s)


@dataclass(frozen=True)
class Preset:
    """A fixed run.

    steps: number of calls of `advance` for given shapes and globs. budget_s: default seconds of timing per cell.
    begin: called first with the command line; may refuse this machine by a ValueError, or start the program anew in another
    environment. peers: which of the peers take part. mark: fields added to each result line.
    """

    run: Callable[[Setup], Iterator[str]]
    steps: Callable[[Sequence[Shape], Sequence[str]], int]
    budget_s: float = 10.0
    begin: Callable[[Sequence[str]], None] = lambda _: None
    peers: Callable[[Sequence[Peer]], Sequence[Peer]] = lambda peers: peers
    mark: Callable[[], Mapping[str, Any]] = dict


def _of_table(table: Table, more: int = 0) -> Callable[[Sequence[Shape], Sequence[str]], int]:
    return lambda *_: len(table.shapes) * len(table.ms) + more


PRESETS: dict[str, Preset] = {
    "cpu-targets": Preset(cpu_targets, _of_table(CPU, len(FIGURES))),
    "avx2-targets": Preset(
        avx2_targets, _of_table(AVX2, 1 + len(QUANTIZING)), 5.0, held.restart, held.admit, held.mark
    ),
    "amx-targets": Preset(amx_targets, _of_table(AMX, 1 + len(QUANTIZING)), 5.0, needs_amx),
    "sparse-targets": Preset(sparse_targets, _of_table(SPARSE)),
    "form-targets": Preset(form_targets, _of_table(FORMS), 5.0),
    "sparse-crossover": Preset(
        sparse_crossover, lambda shapes, _: len(shapes) * len(crossover.MS) * len(crossover.SERIES)
    ),
    WHOLE: Preset(whole_models, lambda *_: len(whole_cells()), 20.0, mark=held.mark_if_held),
    MODULES: Preset(
        partial(whole_models, preset=MODULES), lambda *_: len(whole_cells(MODULES)), 10.0, mark=held.mark_if_held
    ),
    "accuracy": Preset(accuracy, lambda _, only: language.steps(only)),
}
