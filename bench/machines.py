"""Classes of machines, and which of them were measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .figures import Figure, worst
from .goal_tables import TABLES
from .goals import checks

Row = Mapping[str, Any]

FILE = "machines.json"


@dataclass(frozen=True)
class Class:
    """Machines that run the same kernels. targets: names of nybble's targets, of which a CPU of this class has one as its
    fastest. unmeasured: how the kernels are checked while there are no results.
    """

    name: str
    targets: tuple[str, ...]
    unmeasured: str


# The slowest first.
CLASSES: dict[str, Class] = {
    "avx2": Class("AVX2 alone (Intel Haswell to Comet Lake, AMD Zen 1 to 3)", ("avx2",), "tested bit for bit"),
    "avxvnni": Class(
        "AVX-VNNI without AVX-512 (Intel Alder Lake and later Core)",
        ("avxvnni",),
        "tested bit for bit on Zen 5, which has it too",
    ),
    "avx512bw": Class(
        "AVX-512 without VNNI (Intel Skylake-SP, Skylake-X)", ("avx512bw",), "tested bit for bit on Zen 5, held to it"
    ),
    "avx512vnni": Class(
        "AVX-512 with VNNI (Intel Cascade Lake and Ice Lake, AMD Zen 4 and 5)",
        ("avx512vnni", "avx512vbmi", "avx512bf16"),
        "tested bit for bit",
    ),
    "amx": Class("AMX (Intel Sapphire Rapids and later Xeon)", ("amx",), "tested bit for bit on Emerald Rapids"),
    "arm": Class(
        "64-bit Arm (Neoverse, Cortex, Apple)",
        ("neon", "neondot", "i8mm", "neonbf16"),
        "compared with the scalar kernels in an emulator",
    ),
    "gpu": Class("NVIDIA GPU", (), "tested in emulators"),
}


@dataclass(frozen=True)
class Result:
    """One file: ``<machine>-<what>-<date>``. ``rows``: its lines of JSON; a demo's one object is one row."""

    machine: str
    what: str
    date: str
    name: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Machine:
    """A machine of the result files. kind: key of CLASSES."""

    description: str
    kind: str


def read_machines(folder: Path) -> dict[str, Machine]:
    """Name of a machine in file names -> what it is, in the order in which they are shown.

    Raises:
        ValueError: a machine's class is not one of CLASSES, or its description is missing.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    found = {}
    for name, fields in json.loads(path.read_text(encoding="utf-8")).items():
        if not isinstance(fields, dict) or fields.keys() != {"class", "description"} or fields["class"] not in CLASSES:
            raise ValueError(f"{path}: {name}: must be a description and a class, one of {', '.join(CLASSES)}")
        found[name] = Machine(fields["description"], fields["class"])
    return found


def class_of(result: Result, machines: Mapping[str, Machine]) -> str:
    """The class whose kernels a file measures: by the targets that its rows name, else by what holds it, else its machine's.

    A run that NYBBLE_TARGET limits names the targets up to that one.
    """
    told = (row if row.get("kind") == "run" else row.get("machine") for row in result.rows)
    named = next((one["targets"] for one in told if isinstance(one, Mapping) and "targets" in one), ())
    found = [key for key, one in CLASSES.items() for target in named if target in one.targets]
    held = ["avx2"] if any("held" in row for row in result.rows) else []
    return (machines[result.machine].kind, *held, *found)[-1]


def overview(results: Sequence[Result], machines: Mapping[str, Machine]) -> Iterator[tuple[str, ...]]:
    """A row of each class: its name, the machines whose demo was run, what its layers reached, and what quantizing did."""
    for key, one in CLASSES.items():
        mine = [result for result in results if class_of(result, machines) == key]
        demos = [where(result, machines) for result in mine if result.what == "demo"]
        layers = [
            f"`{result.what}`: {_met(result)}, {where(result, machines)}" for result in mine if result.what in TABLES
        ]
        layers += [f"measured: {where(result, machines)}" for result in mine if result.what == "gpu"]
        costs = [f"{_costs(worst(result.rows))}, {where(result, machines)}" for result in mine if worst(result.rows)]
        yield (
            one.name,
            "; ".join(demos) or "never",
            "; ".join(layers) or f"never; {one.unmeasured}",
            "; ".join(costs) or "never",
        )


def _costs(figures: Mapping[str, Figure]) -> str:
    """How many targets of quantizing are met, and those that are missed."""
    met = [figure.met for figure in figures.values()].count(True)
    missed = [f"{topic} {figure.reached}" for topic, figure in figures.items() if not figure.met]
    return ", ".join((f"{met} of {len(figures)} targets met", *missed))


def where(result: Result, machines: Mapping[str, Machine]) -> str:
    """The machine of a result, what held the run, and the date."""
    held = held_to(result.rows)
    return f"{machines[result.machine].description}{f', {held}' if held else ''}, {result.date}"


def held_to(rows: Sequence[Row]) -> str:
    """What holds a run, in short; "" where nothing does."""
    if any("held" in row for row in rows):
        return "held to AVX2"
    cap = next((row.get("cap") for row in rows if row.get("kind") == "run"), None)
    return f"nybble held to {cap}, the others not" if cap else ""


def _met(result: Result) -> str:
    """How many of the targets that were measured are met, which were not measured, and how many other figures are met."""
    judged = [one for one in checks(TABLES[result.what], result.rows) if one.goal.bound is not None]
    known = [one.met for one in judged if one.met is not None]
    unknown: dict[str, list[int]] = {}
    for one in judged:
        if one.met is None:
            unknown.setdefault(one.goal.label, []).append(one.goal.m)
    if not known:
        return f"none of {len(judged)} targets measured"
    names = "; ".join(f"{label} at M = {', '.join(map(str, ms))}" for label, ms in unknown.items())
    others = (Figure.of(row) for row in result.rows if row["kind"] == "figure")
    figures = [figure.met for figure in others if figure.topic is None]
    return (
        f"{known.count(True)} of {len(known)} measured targets"
        f"{f' and {figures.count(True)} of {len(figures)} other figures' if figures else ''}"
        f" met{f' (not measured: {names})' if names else ''}"
    )
