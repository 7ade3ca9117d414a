"""The demo: build the contestants, measure them, and print a table with notes."""

from __future__ import annotations

import copy
import json
import platform
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import groupby
from statistics import median
from time import perf_counter
from typing import Any

import torch

from .. import __version__
from ..dispatch import targets
from ..evaluate.memory import held_bytes
from ..model.bar import bar
from ..text import wrap
from .breakdown import breakdown
from .checks import CHECKED, CHECKED_SPARSE, MEAN_COSINE, Check, best, best_checks, checks, sparse_checks
from .data import all_sentences
from .measure import Accuracy, Plan, Track, accuracy, make_rounds, measure, speedup
from .model import MODEL_NAME, load
from .sparse import contestants
from .table import show_table
from .variants import BF16_W8A8, DYNAMIC, FP32, ONNX_RUNTIME, VARIANTS, W8A8, Built, NotHere

_HEADERS = ("contestant", "batch 32/s", "vs fp32", "batch 1/s", "MB", "cos mean", "cos worst", "top-1 %", "sentences")


@dataclass(frozen=True)
class Row:
    """One contestant: sentences per second at both batches, speed ratio to fp32, megabytes held (1e6 bytes)."""

    name: str
    batch_rate: float
    speedup: float
    single_rate: float
    megabytes: float
    accuracy: Accuracy
    sentences: int  # run at batch 32
    singles: int  # run at batch 1
    report: dict[str, Any] | None = None  # nybble's own report of the swap

    def cells(self) -> tuple[str, ...]:
        a = self.accuracy
        rates = (f"{self.batch_rate:.1f}", f"{self.speedup:.2f}x", f"{self.single_rate:.1f}", f"{self.megabytes:.1f}")
        return (
            self.name,
            *rates,
            f"{a.mean_cosine:.5f}",
            f"{a.worst_cosine:.5f}",
            f"{100 * a.top1:.1f}",
            str(self.sentences),
        )


@dataclass(frozen=True)
class Outcome:
    """All measurements, ready to print or to write as JSON."""

    machine: dict[str, Any]
    plan: Plan
    sentences: int
    rows: list[Row]
    skipped: dict[str, str]  # contestant -> why it could not be made
    shares: dict[str, dict[str, float]]  # time by operation, of each contestant that has a check
    checks: dict[str, list[Check]]
    seconds: float

    def to_json(self) -> str:
        data = asdict(self)
        data["checks"] = {
            name: [{**asdict(check), "met": check.met} for check in found] for name, found in self.checks.items()
        }
        return json.dumps(data, indent=2)


def _machine() -> dict[str, Any]:
    import transformers

    return {
        "nybble": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": targets.detect().cpu,
        "targets": list(targets.detect().targets),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "model": MODEL_NAME,
    }


def _row(name: str, built: Built, tracks: dict[str, Track], plan: Plan) -> Row:
    track = tracks[name]
    return Row(
        name=name,
        batch_rate=plan.round_size / median(track.batch_s),
        speedup=speedup(track, tracks[FP32]),
        single_rate=plan.singles_per_round / median(track.single_s),
        megabytes=held_bytes(built.model) / 1e6 if built.megabytes is None else built.megabytes,
        accuracy=accuracy(track, tracks[FP32]),
        sentences=plan.round_size * len(track.batch_s),
        singles=plan.singles_per_round * len(track.single_s),
        report=None if built.report is None else json.loads(built.report.to_json()),
    )


def run(plan: Plan, sparse: bool = False) -> Outcome:
    """Build and measure all contestants. Raises DemoUnavailable at the start if the `demo` extra is not installed."""
    start = perf_counter()
    encoder = load()
    sentences = all_sentences()
    rounds = make_rounds(encoder, sentences[: plan.sentences], plan)
    rest = sentences[plan.sentences : plan.sentences + plan.calibration]
    variants = contestants(encoder.tokenize(rest, plan.rows)) if sparse else VARIANTS
    built: dict[str, Built] = {}
    skipped: dict[str, str] = {}
    with bar(len(variants) * (len(rounds) + 1)) as advance:
        for variant in variants:
            try:
                built[variant.name] = variant.build(copy.deepcopy(encoder.model))
            except NotHere as error:
                skipped[variant.name] = str(error)
            advance(variant.name)
        tracks = measure({name: b.model for name, b in built.items()}, rounds, plan, advance)
    profiled = [batch for work in rounds[:4] for batch in work.batches]
    if sparse:
        shares = {name: breakdown(built[name].model, profiled) for name in (W8A8, CHECKED_SPARSE)}
        found = {CHECKED_SPARSE: sparse_checks(tracks)}
    else:
        winner = best(tracks)
        named = [name for name in dict.fromkeys((DYNAMIC, *CHECKED, winner)) if name in built]
        shares = {name: breakdown(built[name].model, profiled) for name in named}
        found = {name: checks(tracks, name, shares[name]["linears"]) for name in CHECKED}
        found[_best_title(winner)] = best_checks(tracks, winner, shares, plan.round_size)
    return Outcome(
        machine=_machine(),
        plan=plan,
        sentences=plan.round_size * len(rounds),
        rows=[_row(name, b, tracks, plan) for name, b in built.items()],
        skipped=skipped,
        shares=shares,
        checks=found,
        seconds=perf_counter() - start,
    )


def _best_title(winner: str | None) -> str:
    return f"the fastest nybble variant with a mean cosine of at least {MEAN_COSINE} ({winner or 'none here'})"


def _notes(outcome: Outcome) -> list[str]:
    notes = [
        "batch 32/s, batch 1/s: sentences per second, median over rounds; the contestants run in turns.",
        "MB: parameters and buffers, or the file. cos: cosine to the fp32 vectors; top-1: same nearest sentence as fp32.",
    ]
    if any(row.name == ONNX_RUNTIME for row in outcome.rows):
        notes.append(
            f"{ONNX_RUNTIME}: its own fused graph of transformers, and quantize_dynamic with a scale per output."
        )
    if any(row.name == BF16_W8A8 for row in outcome.rows):
        notes.append(f"{BF16_W8A8}: the whole model in bfloat16, its linear layers in w8a8.")
    most = max(row.singles for row in outcome.rows)
    for row in outcome.rows:
        if row.sentences < outcome.sentences or row.singles < most:
            notes.append(
                f"{row.name} is slow here: its time budget was enough for {row.sentences} of {outcome.sentences} "
                f"sentences in batches and {row.singles} of {most} one by one; its figures are of these only."
            )
    for swapped, rows in groupby((row for row in outcome.rows if row.report), key=_swapped):
        names = [row.name for row in rows]
        which = names[0] if len(names) == 1 else f"{names[0]} and the next {len(names) - 1}"
        notes.append(f"{which}: {swapped}")
    return notes + [f"{name}: not run: {reason}" for name, reason in outcome.skipped.items()]


def _swapped(row: Row) -> str:
    assert row.report is not None, "only called for nybble's contestants"  # noqa: S101
    count = sum(layer["swapped"] for layer in row.report["layers"])
    return f"{count} layers swapped, {row.report['coverage']:.0f}% of the weight bytes."


def _foot(outcome: Outcome) -> list[str]:
    lines = []
    for name, parts in outcome.shares.items():
        shares = ", ".join(f"{part} {100 * share:.0f}%" for part, share in parts.items())
        lines.append(f"Time of {name} at batch {outcome.plan.rows} (torch.profiler), unfused: {shares}.")
    return [
        *lines,
        "Where the profiler looks, models run unfused: everything but the linears is then torch's own code.",
    ]


def show(outcome: Outcome) -> None:
    """Print the heading, the table and the notes to stdout."""
    m = outcome.machine
    print(f"{m['model']}, {outcome.sentences} sentences of Python's own documentation, {m['date']}")
    machine = f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, nybble {m['nybble']} ({m['targets'][-1]})"
    print(*wrap(machine), "", sep="\n")
    show_table(_HEADERS, [row.cells() for row in outcome.rows], right=range(1, len(_HEADERS)))
    for part in (_notes(outcome), _foot(outcome)):
        print("", *(line for text in part for line in wrap(text, rest="  ")), sep="\n")
    for name, found in outcome.checks.items():
        lines = [line for check in found for line in wrap(check.line(), rest=" " * 11)]
        print("", *wrap(f"Targets for {name}:"), *lines, sep="\n")
    print(f"\n{outcome.seconds:.0f} seconds in total.")


def main(plan: Plan, as_json: bool, sparse: bool = False) -> None:
    """Run `nybble demo`."""
    outcome = run(plan, sparse)
    if as_json:
        print(outcome.to_json())
    else:
        show(outcome)
