"""The lines that ``python -m nybble.stress --json`` and ``fuzz/run.py`` print, kept in ``bench/results/<machine>-reliability.jsonl``,
and the tables of docs/reliability.md that are made from them.

A figure may be run in slices, each with a seed of its own, on any days: what they tried adds up. Where there are only so many
to try, slices add up that are of one length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..demo.table import markdown_table
from ..stress.figure import FUZZ, Figure, Tally, told
from ..stress.readers import READERS
from ..stress.table import FIGURES

Row = Mapping[str, Any]
Lines = Mapping[str, Sequence[Row]]  # by machine

FILE = re.compile(r"([a-z0-9_]+)-reliability\.jsonl")
_KEYS = {"figure", "seed", "tried", "failed", "date", "versions"}
_KEYS_OF = {FUZZ: {"reader", "cpu_seconds"}}
_KEYS_OF_FIGURE = {"asked", "facts", "on", "targets"}
_HOUR = 3600.0  # seconds of a processor that each reader is to be fuzzed


def read(path: Path) -> list[Row]:
    """The lines of a file. Raises ValueError where one is no result, or tries what another one has tried."""
    rows, seen = [], set()
    known = {figure.name for figure in FIGURES}
    finite = {figure.name for figure in FIGURES if figure.finite}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}:{number}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        name = row.get("figure") if isinstance(row, dict) else None
        if name not in known | {FUZZ}:
            raise ValueError(f"{where}: figure {name!r}: must be one of {', '.join(sorted(known | {FUZZ}))}")
        if lacking := sorted((_KEYS | _KEYS_OF.get(name, _KEYS_OF_FIGURE)) - row.keys()):
            raise ValueError(f"{where}: lacks {', '.join(lacking)}")
        key = name, row.get("reader"), row.get("asked") if name in finite else None, row["seed"]
        if key in seen:
            raise ValueError(f"{where}: seed {row['seed']}: another line of {name} has it, so both tried the same")
        seen.add(key)
        rows.append(row)
    return rows


def read_all(folder: Path, machines: Mapping[str, object]) -> Lines:
    """The lines of every machine. Raises ValueError as ``read``, or for a machine that machines.json does not describe."""
    found = {}
    for path in sorted(folder.glob("*-reliability.jsonl")):
        match = FILE.fullmatch(path.name)
        if match is None or match[1] not in machines:
            raise ValueError(f"{path}: the name must be <machine>-reliability.jsonl, with a machine of machines.json")
        found[match[1]] = read(path)
    return found


def _range(values: Sequence[Any]) -> str:
    first, last = min(values), max(values)
    return f"{first}" if first == last else f"{first} to {last}"


def _command(figure: Figure, rows: Sequence[Row]) -> str:
    """What to run for the same lines: the seeds of each count."""
    data = " --data DIR" if figure.takes else ""
    seeds: dict[int, list[int]] = {}
    for row in rows:
        seeds.setdefault(row["asked"], []).append(row["seed"])
    if seeds == {figure.count: [0]}:
        return f"`{figure.name}{data}`"
    runs = (f"`{figure.name}{data} --count {count}`, {_seeds(of)}" for count, of in sorted(seeds.items(), reverse=True))
    return "; ".join(runs)


def _seeds(found: Sequence[int]) -> str:
    if len(found) == 1:
        return f"seed {found[0]}"
    if max(found) - min(found) == len(found) - 1:
        return f"seeds {_range(found)}"
    return f"seeds {', '.join(map(str, sorted(found)))}"


def _line(figure: Figure, rows: Sequence[Row]) -> tuple[str, ...]:
    if not rows:
        return f"`{figure.name}`", "not run", "", "", "", ""
    if figure.finite:  # slices of another length have tried some of the same
        lengths = {row["asked"]: [other for other in rows if other["asked"] == row["asked"]] for row in rows}
        rows = max(lengths.values(), key=lambda slices: sum(row["tried"] for row in slices))
    sums = Tally()
    for row in rows:
        sums.merge(Tally(row["tried"], row["failed"], [], row["facts"], row["on"]))
    share = sum(row["asked"] for row in rows) / figure.count
    besides = told({"facts": sums.facts, "on": sums.on}).removeprefix(", ")
    whole, dates = "all" if share >= 1 else f"{share:.1%}", _range([row["date"] for row in rows])
    return _command(figure, rows), f"{sums.tried:,}", whole, f"{sums.failed:,}", besides, dates


def _versions(rows: Sequence[Row]) -> str:
    """Of all runs."""
    versions: dict[str, list[str]] = {}
    for row in rows:
        for name, version in row["versions"].items():
            versions.setdefault(name, []).append(version)
    return ", ".join(f"{name} {_range(found)}" for name, found in versions.items())


def figures(lines: Lines, machines: Mapping[str, str]) -> str:
    """A table of each machine; machines: their descriptions. What one machine has run is left out where another has not."""
    headers = ("command: `python -m nybble.stress`", "tried", "of all", "failed", "besides", "date")
    parts = []
    run_at_all = {row["figure"] for rows in lines.values() for row in rows}
    for machine, rows in lines.items():
        runs = [row for row in rows if row["figure"] != FUZZ]
        if not runs:
            continue
        named = {row["figure"] for row in runs}
        shown = [figure for figure in FIGURES if figure.name in named or figure.name not in run_at_all]
        table = [_line(figure, [row for row in runs if row["figure"] == figure.name]) for figure in shown]
        targets = ", ".join(dict.fromkeys(target for row in runs for target in row["targets"]))
        where = f"{machines[machine]}; {_versions(runs)}; targets {targets}:"
        parts.append(f"{where}\n\n{markdown_table(headers, table)}")
    return "\n\n".join(parts) or "Nothing has been run yet."


def fuzzing(lines: Lines, machines: Mapping[str, str]) -> str:
    """A table of the readers, which do not depend on the machine: what any has tried adds up."""
    headers = ("reader", "files", "seconds of a processor", "of an hour", "findings", "date")
    runs = {machine: [row for row in rows if row["figure"] == FUZZ] for machine, rows in lines.items()}
    table = []
    for reader in READERS:
        mine = [row for rows in runs.values() for row in rows if row["reader"] == reader.name]
        seconds = sum(row["cpu_seconds"] for row in mine)
        files, findings = (f"{sum(row[key] for row in mine):,}" for key in ("tried", "failed"))
        dates = _range([row["date"] for row in mine]) if mine else "not run"
        table.append((f"`{reader.name}`", files, f"{seconds:,.0f}", f"{seconds / _HOUR:.0%}", findings, dates))
    where = "\n".join(f"- {machines[machine]}; {_versions(rows)}" for machine, rows in runs.items() if rows)
    return f"{where}\n\n{markdown_table(headers, table)}".strip()
