"""``python -m nybble.bench docs``: writes the generated parts of README.md and docs/.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- /generated -->``. What it shows comes from the registry of
kernels and from ``bench/results/``, so that no table is copied by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..__main__ import kernel_markdown
from ..demo.table import markdown_table
from ..dispatch.registry import specs
from . import atomic, gpu_goals, reliability
from .docs_results import WHATS, conditions, newest, ratio, read_results, single_speedup
from .figures import worst
from .held import told
from .machines import CLASSES, Machine, Result, class_of, held_to, overview, read_machines, where

RESULTS = Path("bench", "results")
_PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(?:.*?\n)??(<!-- /generated -->)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """What the parts are made from: descriptions of the machines, results, of each kind the newest, and lines of reliability."""

    machines: Mapping[str, Machine]
    results: Sequence[Result]
    lines: reliability.Lines

    @classmethod
    def read(cls, root: Path) -> Source:
        """From the repository at ``root``. Raises ValueError as ``read_results`` does."""
        folder = root / RESULTS
        machines = read_machines(folder)
        return cls(machines, newest(read_results(folder)), reliability.read_all(folder, machines))

    def descriptions(self) -> dict[str, str]:
        """Those of the machines, by name."""
        return {name: machine.description for name, machine in self.machines.items()}

    def of(self, what: str) -> list[Result]:
        """The results of one kind, in the order of the machines."""
        found = {result.machine: result for result in self.results if result.what == what}
        return [found[machine] for machine in self.machines if machine in found]


def picture(source: Source) -> str:
    """The demo on every machine: each contestant's speed over torch fp32, the fastest in bold."""
    lines: list[tuple[str, ...]] = []
    for result in source.of("demo"):
        (outcome,) = result.rows
        rows = [row for row in outcome["rows"] if row["name"] != "torch fp32"]
        batch = [row["speedup"] for row in rows]
        single = [single_speedup(row, outcome["rows"]) for row in rows]
        for i, row in enumerate(rows):
            cosine = row.get("accuracy", {}).get("mean_cosine")
            lines.append(
                (
                    f"{source.machines[result.machine].description}, {result.date}" if i == 0 else "",
                    row["name"],
                    _bold(batch[i], batch),
                    _bold(single[i], single),
                    "-" if cosine is None else f"{cosine:.4f}",
                )
            )
    if not lines:
        return "Nothing has been measured yet."
    return markdown_table(("machine, date", "contestant", "batch 32", "batch 1", "cosine"), lines)


def _bold(value: float | None, values: Sequence[float | None]) -> str:
    best = max((other for other in values if other is not None), default=None)
    return f"**{ratio(value)}**" if value is not None and value == best else ratio(value)


def others_win(source: Source) -> str:
    """On which machines another contestant of the demo is faster than nybble's fastest, and by how much."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in source.of("demo"):
        rows = result.rows[0]["rows"]
        for what, speed in (("in batches of 32", lambda row: row["speedup"]), ("one by one", _single(rows))):
            speeds = {row["name"]: value for row in rows if (value := speed(row)) is not None}
            best = max(speeds, key=speeds.__getitem__, default="")
            ours = max((value for name, value in speeds.items() if name.startswith("nybble")), default=None)
            if ours is not None and speeds[best] > ours:
                where = source.machines[result.machine].description
                found.setdefault((best, where), []).append(f"{speeds[best] / ours:.2f}x {what}")
    lines = [f"{best} ({' and '.join(by)}) on {where}" for (best, where), by in found.items()]
    return f"Where others win in the demo, over nybble's fastest: {'; '.join(lines) or 'nowhere that was measured'}."


def _single(rows: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda row: single_speedup(row, rows)


def decoding(source: Source) -> str:
    """Tokens a second of the Llama-shaped model on every machine, the fastest first."""
    lines = []
    for result in source.of("model"):
        rows = sorted(result.rows, key=lambda row: -row["decode_tokens_s"])
        speeds = ", ".join(f"{row['decode_tokens_s']:.1f} with {row['contestant']}" for row in rows)
        lines.append(f"{speeds} ({source.machines[result.machine].description}, {result.date})")
    found = "; ".join(lines) or "not measured yet"
    return f"Decoding, tokens per second of a Llama-shaped model of 0.79 B parameters: {found}."


def machines(source: Source) -> str:
    """What was measured on which class of machines, and what never was."""
    return markdown_table(
        ("machines", "`nybble demo`", "layers", "quantizing"), list(overview(source.results, source.machines))
    )


def quantizing(source: Source) -> str:
    """What quantizing costs on every machine: of each topic the figure that is the nearest to its bound, or beyond it."""
    found = {where(result, source.machines): figures for result in source.results if (figures := worst(result.rows))}
    if not found:
        return "What quantizing costs was not measured yet."
    topics = list(dict.fromkeys(topic for figures in found.values() for topic in figures))
    lines = [
        (place, *(figures[topic].reached if topic in figures else "not measured" for topic in topics))
        for place, figures in found.items()
    ]
    return markdown_table(("quantizing on", *topics), lines)


def benchmarks(source: Source) -> str:
    """Every table of every machine but those of GPUs, by class, each with the name of its file."""
    order = list(WHATS)
    parts = []
    for key, one in CLASSES.items():
        found = [result for result in source.results if class_of(result, source.machines) == key != "gpu"]
        if key != "gpu":
            parts.append(f"## {one.name}")
            if not found:
                parts.append(f"Never measured; the kernels are {one.unmeasured}.")
        for result in sorted(
            found, key=lambda result: (list(source.machines).index(result.machine), order.index(result.what))
        ):
            what = WHATS[result.what]
            note = next((row["note"] for row in result.rows if "note" in row), "")
            held = told(result.rows) or held_to(result.rows)
            parts.append(f"### {what.heading}: {source.machines[result.machine].description}")
            facts = ", ".join(filter(None, (result.date, held, conditions(result.rows), f"`{RESULTS / result.name}`")))
            parts.append(f"{facts}{f': {note}' if note else ''}.")
            parts.append(what.markdown(result.rows))
    return "\n\n".join(parts)


def gpu(source: Source) -> str:
    """The goals on GPUs: one table for each GPU that was measured, or the goals alone."""
    found = source.of("gpu")
    tables = [
        f"{source.machines[one.machine].description}, {one.date}:\n\n{gpu_goals.markdown(one.rows)}" for one in found
    ]
    return "\n\n".join(tables) or gpu_goals.markdown()


def gpu_kernels(_: Source) -> str:
    """Which kernel serves how many rows on a GPU."""
    rows = [
        (f"`{spec.name}`", spec.scheme, spec.target, f"{least} to {most}" if most else f"{least} and more")
        for spec in specs()
        if spec.device == "cuda"
        for least, most in (spec.m_range,)
    ]
    return markdown_table(("kernel", "computes", "target", "rows"), rows)


PARTS: dict[str, Callable[[Source], str]] = {
    "picture": picture,
    "others-win": others_win,
    "decoding": decoding,
    "machines": machines,
    "quantizing": quantizing,
    "benchmarks": benchmarks,
    "gpu-goals": gpu,
    "gpu-kernels": gpu_kernels,
    "kernels": lambda _: kernel_markdown(),
    "reliability": lambda source: reliability.figures(source.lines, source.descriptions()),
    "fuzzing": lambda source: reliability.fuzzing(source.lines, source.descriptions()),
}


def pages(root: Path) -> list[Path]:
    """The pages that may have generated parts."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def generated(text: str, source: Source) -> str:
    """A page with its generated parts as they should be.

    Raises:
        ValueError: a part has no generator, or no end.
    """
    if len(_PART.findall(text)) != text.count("<!-- generated: "):
        raise ValueError("generated: a part does not end in <!-- /generated -->")

    def part(found: re.Match[str]) -> str:
        if found[2] not in PARTS:
            raise ValueError(f"generated: {found[2]}: must be one of {', '.join(PARTS)}")
        return f"{found[1]}\n{PARTS[found[2]](source)}\n\n{found[3]}"

    return _PART.sub(part, text)


def update(root: Path, check: bool) -> list[Path]:
    """Writes the pages whose generated parts are out of date, or with ``check`` only finds them; returns these.

    Raises:
        ValueError: ``root`` is not nybble's repository, or a page or a file of results is wrong.
        OSError: a page cannot be written.
    """
    if not (root / "mkdocs.yml").is_file():
        raise ValueError(f"--root {root}: no mkdocs.yml there; it must be a clone of nybble's repository")
    source, changed = Source.read(root), []
    for page in pages(root):
        old = page.read_text(encoding="utf-8")
        new = generated(old, source)
        if new != old:
            changed.append(page)
            if not check:
                atomic.write(page, new.encode(), 0o644)
    return changed
