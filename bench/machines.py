"""Classes of machines, and which of them were measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .goal_tables import TABLES
from .goals import checks

Row = Mapping[str, Any]

FILE = "machines.json"


@dataclass(frozen=True)
class Class:
    """Machines that run the same kernels. layers: what of a result file measures these kernels, on any machine.

    unmeasured: how the kernels are checked instead, shown while there is no such file.
    """

    name: str
    layers: str | None
    unmeasured: str


# By the name of nybble's target, the slowest first.
CLASSES: dict[str, Class] = {
    "avx2": Class("AVX2 alone (Intel Haswell to Comet Lake, AMD Zen 1 to 3)", "avx2-targets", "tested bit for bit"),
    "avxvnni": Class(
        "AVX-VNNI without AVX-512 (Intel Alder Lake and later Core)",
        None,
        "tested bit for bit on Zen 5, which has it too",
    ),
    "avx512bw": Class(
        "AVX-512 without VNNI (Intel Skylake-SP, Skylake-X)", None, "tested bit for bit on Zen 5, held to it"
    ),
    "avx512vnni": Class(
        "AVX-512 with VNNI (Intel Cascade Lake and Ice Lake, AMD Zen 4 and 5)", "cpu-targets", "tested bit for bit"
    ),
    "amx": Class(
        "AMX (Intel Sapphire Rapids and later Xeon)", "amx-targets", "tested bit for bit in an emulation, and counted"
    ),
    "gpu": Class("NVIDIA GPU", "gpu", "tested in emulators"),
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
    """The class whose kernels a file measures: that of its machine, if the run was not held to another one's."""
    return next((key for key, one in CLASSES.items() if one.layers == result.what), machines[result.machine].kind)


def overview(results: Sequence[Result], machines: Mapping[str, Machine]) -> Iterator[tuple[str, str, str]]:
    """A row of each class: its name, the machines whose demo was run, and what its layers reached."""
    for key, one in CLASSES.items():
        mine = [result for result in results if class_of(result, machines) == key]
        demos = [_where(result, machines) for result in mine if result.what == "demo"]
        layers = [f"{_met(result)}: {_where(result, machines)}" for result in mine if result.what == one.layers]
        yield one.name, "; ".join(demos) or "never", "; ".join(layers) or f"never; {one.unmeasured}"


def _where(result: Result, machines: Mapping[str, Machine]) -> str:
    held = any("held" in row for row in result.rows)
    return f"{machines[result.machine].description}{', held to AVX2' if held else ''}, {result.date}"


def _met(result: Result) -> str:
    if result.what not in TABLES:
        return "measured"
    judged = [one.met for one in checks(TABLES[result.what], result.rows) if one.goal.bound is not None]
    return f"{judged.count(True)} of {len(judged)} targets met"
