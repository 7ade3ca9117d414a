"""The files of bench/results/, and each of them as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..demo.table import markdown_table
from . import accuracy, crossover, gpu_goals, gpu_run, reliability
from .figures import Figure
from .goal_tables import TABLES
from .goals import show
from .machines import FILE, Result, read_machines
from .output import load
from .report_rows import model_table
from .whole import show as whole_show

Row = Mapping[str, Any]

BASELINE = "torch fp32"


def read_results(folder: Path) -> list[Result]:
    """Every file of results, by name, but those of reliability.

    Raises:
        ValueError: a file has another name than those of WHATS, its machine is not in machines.json, or it does not hold
            results.
    """
    machines, found = read_machines(folder), []
    for path in sorted(folder.glob("*")):
        if path.name == FILE or reliability.FILE.fullmatch(path.name):
            continue
        parts = _NAME.fullmatch(path.name)
        if parts is None:
            raise ValueError(
                f"{path}: the name must be <machine>-<what>-<date>{{.json,.jsonl}}, what: {', '.join(WHATS)}"
            )
        machine, what, date, suffix = parts.groups()
        if suffix != WHATS[what].suffix:
            raise ValueError(f"{path}: results of {what} end in {WHATS[what].suffix}")
        if machine not in machines:
            raise ValueError(f"{path}: {folder / FILE} does not describe the machine {machine!r}")
        found.append(Result(machine, what, date, path.name, WHATS[what].read(path)))
    return found


def newest(results: Sequence[Result]) -> list[Result]:
    """Of each machine and what was measured, the last by date."""
    last = {(result.machine, result.what): result for result in sorted(results, key=lambda result: result.date)}
    return list(last.values())


def single_speedup(row: Row, rows: Sequence[Row]) -> float | None:
    """Of a contestant of the demo: sentences a second one by one, over the baseline's; None where it is not known."""
    if "single_speedup" in row:
        return float(row["single_speedup"])
    base = next((other.get("single_rate") for other in rows if other["name"] == BASELINE), None)
    return row["single_rate"] / base if base and "single_rate" in row else None


def ratio(value: float | None) -> str:
    """A ratio as the tables write it."""
    return "-" if value is None else f"{value:.2f}x"


def conditions(rows: Sequence[Row]) -> str:
    """Under what the results were measured, as far as they say: threads, versions, commit."""
    run = next((row for row in rows if row.get("kind") == "run"), None)
    if run is None:  # a demo, or a GPU, whose tables say it
        machine = rows[0].get("machine", {}) if rows else {}
        threads, versions = machine.get("threads"), {key: machine[key] for key in ("torch", "nybble") if key in machine}
        return ", ".join([*([_threads([threads])] if threads else []), *_versions(versions)])
    threads = _threads(run["threads"])
    commit = f"commit {run['commit'][:7]}" if run["commit"] else "no commit"
    return ", ".join((threads, commit, *_versions(run["versions"])))


def _threads(counts: Sequence[int]) -> str:
    return f"{' or '.join(map(str, counts))} thread{'' if list(counts) == [1] else 's'}"


def _versions(versions: Mapping[str, str]) -> list[str]:
    return [f"{name} {version}" for name, version in versions.items() if name != "python"]


def _read_demo(path: Path) -> list[Row]:
    try:
        outcome = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(outcome, dict) or not {"machine", "rows"} <= outcome.keys():
        raise ValueError(f"{path}: not what `nybble demo --json` prints")
    return [outcome]


_DEMO_COLUMNS: dict[str, Callable[[Row], Any]] = {
    "batch 32/s": lambda row: row.get("batch_rate"),
    "batch 1/s": lambda row: row.get("single_rate"),
    "MB": lambda row: row.get("megabytes"),
}


def _demo(rows: Sequence[Row]) -> str:
    (outcome,) = rows
    lines = []
    for row in outcome["rows"]:
        numbers = [how(row) for how in _DEMO_COLUMNS.values()]
        lines.append(
            (
                row["name"],
                *("-" if number is None else f"{number:.1f}" for number in numbers),
                ratio(row["speedup"]),
                ratio(single_speedup(row, outcome["rows"])),
                *(_digits(row.get("accuracy", {}).get(key)) for key in ("mean_cosine", "worst_cosine", "top1")),
            )
        )
    headers = (
        "contestant",
        *_DEMO_COLUMNS,
        "batch 32 vs fp32",
        "batch 1 vs fp32",
        "cosine mean",
        "worst",
        "same top-1",
    )
    return markdown_table(headers, lines)


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _of(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _figures(rows: Sequence[Row]) -> str:
    return "\n".join(f"- {Figure.of(row)}" for row in _of(rows, "figure"))


def _targets(preset: str, rows: Sequence[Row]) -> str:
    return "\n\n".join(filter(None, (_listed(show(TABLES[preset], rows, markdown=True)), _figures(rows))))


def _listed(text: str) -> str:
    """A preset's table whose lines after the table are items of a list."""
    head, _, rest = text.rpartition(" |\n\n")
    return f"{head} |\n\n" + "\n".join(f"- {line}" for line in rest.splitlines()) if rest else text.strip()


def _crossover(rows: Sequence[Row]) -> str:
    return crossover.table(crossover.maps(list(map(dict, rows))))


def _model(rows: Sequence[Row]) -> str:
    found = model_table(list(map(dict, rows)))
    return "" if found is None else markdown_table(*found)


def _whole(rows: Sequence[Row]) -> str:
    found = list(map(dict, rows))
    return "\n\n".join((whole_show.goals(found, markdown_table), *whole_show.models(found, markdown_table)))


def _accuracy(rows: Sequence[Row]) -> str:
    nats: dict[tuple[str, str], list[float]] = {}
    for (setting, name, _), value in accuracy.known(map(dict, rows)).items():
        nats.setdefault((setting, name), []).append(value)
    losses = [accuracy.Loss(*key, tuple(values)) for key, values in nats.items()]
    return "\n\n".join(filter(None, (f"```text\n{accuracy.table(losses)}\n```", _figures(rows))))


@dataclass(frozen=True)
class What:
    """A kind of file: heading, end of its name, how it is read, and its Markdown."""

    heading: str
    markdown: Callable[[Sequence[Row]], str]
    suffix: str = ".jsonl"
    read: Callable[[Path], Sequence[Row]] = load


# By what the name of a file says, in the order in which they are shown.
WHATS: dict[str, What] = {
    "demo": What("A sentence encoder (`nybble demo`)", _demo, ".json", _read_demo),
    "demo-sparse": What("The same, pruned (`nybble demo --sparse`)", _demo, ".json", _read_demo),
    "cpu-targets": What("Layers (`--preset cpu-targets`)", partial(_targets, "cpu-targets")),
    "avx2-targets": What("Layers by AVX2 alone (`--preset avx2-targets`)", partial(_targets, "avx2-targets")),
    "amx-targets": What("Layers by AMX (`--preset amx-targets`)", partial(_targets, "amx-targets")),
    "model": What("A whole Llama-shaped model (`--model`)", _model),
    "form-targets": What("Weights of other libraries (`--preset form-targets`)", partial(_targets, "form-targets")),
    "sparse-targets": What("Sparse layers (`--preset sparse-targets`)", partial(_targets, "sparse-targets")),
    "sparse-crossover": What("From how many zeros on sparse layers pay (`--preset sparse-crossover`)", _crossover),
    "whole-models": What("Whole models (`--preset whole-models`)", _whole),
    "modules": What("Models of other modules (`--preset modules`)", _whole),
    "accuracy": What("What a language model loses (`--preset accuracy`)", _accuracy),
    "gpu": What("Goals on a GPU (`gpu_goals.sh`)", gpu_goals.markdown, read=gpu_run.read),
}
_NAME = re.compile(rf"([a-z0-9_]+)-({'|'.join(sorted(WHATS, key=len, reverse=True))})-(20\d\d-\d\d-\d\d)(\.jsonl?)")
