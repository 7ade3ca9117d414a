"""The measured part of gpu_run.sh: ceilings, goals and peers, tuning; JSON lines, and a table last.

    python -m nybble.bench.gpu_run --out FILE [--only STEP,...] [--minutes N]

What FILE already has is not measured again: a run that was cut off goes on where it was. Delete a line to repeat it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from . import gpu_goals, gpu_measure, gpu_tune
from .gpu_goals import Goal
from .gpu_peers import PEERS
from .gpu_state import state, state_text
from .machine import commit, versions
from .shapes import SETS

Row = dict[str, Any]
# Rows, outputs and inputs at which every peer is timed.
PEER_SHAPES = tuple((m, 8192, 8192) for m in (1, 16, 64, 256, 4096))


def read(path: Path) -> list[Row]:
    """The results of a file; none where there is no file.

    Raises:
        ValueError: a line is not a result.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not {"step", "key"} <= row.keys():
            raise ValueError(f"{path}:{number}: not a result: it has no step or no key")
        rows.append(row)
    return rows


def machine_step(done: list[Row], until: float) -> Iterator[Row]:
    """The GPU, its driver, its clocks before anything runs, and the versions."""
    properties = torch.cuda.get_device_properties(0)
    yield {
        "step": "machine",
        "key": "machine",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "state": state(),
        "versions": versions(),
    }


def ceilings_step(done: list[Row], until: float) -> Iterator[Row]:
    """What nothing exceeds."""
    yield {"step": "ceilings", "key": "ceilings", **gpu_measure.ceilings()}


def goals_step(done: list[Row], until: float) -> Iterator[Row]:
    """Every goal and every limit."""
    for goal in gpu_goals.ALL:
        if monotonic() < until and not has(done, "goals", goal.key):
            yield gpu_measure.goal(goal, done) if isinstance(goal, Goal) else gpu_measure.limit(goal, done)


def peers_step(done: list[Row], until: float) -> Iterator[Row]:
    """Every peer on a few shapes."""
    for one in PEERS:
        for m, n, k in PEER_SHAPES:
            key = f"{one.name} {n}x{k} m={m}"
            if monotonic() < until and not has(done, "peers", key):
                yield {"step": "peers", "key": key, "m": m, "n": n, "k": k, **gpu_measure.peer(one, m, n, k)}


def tune_step(done: list[Row], until: float) -> Iterator[Row]:
    """Configurations, in what time is left."""
    for row in gpu_tune.tune(SETS["llama-8b"], until):
        yield {"step": "tune", "key": f"{row['kernel']} {row['n']}x{row['k']} m={row['m']}", **row}


def end_step(done: list[Row], until: float) -> Iterator[Row]:
    """The clocks after all that: lower ones than at first were throttled."""
    yield {"step": "end", "key": "end", "state": state()}


STEPS: dict[str, Callable[[list[Row], float], Iterator[Row]]] = {
    "machine": machine_step,
    "ceilings": ceilings_step,
    "goals": goals_step,
    "peers": peers_step,
    "tune": tune_step,
    "end": end_step,
}


def has(done: Sequence[Row], step: str, key: str | None = None) -> bool:
    """Whether a step, or one result of it, is there already."""
    return any(row["step"] == step and key in (None, row["key"]) for row in done)


def steps_of(text: str) -> list[str]:
    """Names of steps, in their own order.

    Raises:
        ValueError: one is unknown.
    """
    wanted = text.split(",")
    unknown = [name for name in wanted if name not in STEPS]
    if unknown:
        raise ValueError(f"--only {','.join(unknown)}: must be of {', '.join(STEPS)}")
    return [name for name in STEPS if name in wanted]


def report(rows: Sequence[Row]) -> str:
    """What was measured, as text: the machine, its ceilings, the goals."""
    lines = []
    for row in rows:
        if row["step"] == "machine":
            lines.append(f"{row['gpu']}  CUDA {row['cuda']}  torch {row['versions']['torch']}  {row['date']}")
            lines.append(f"at first  {state_text(row['state'])}")
        elif row["step"] == "end":
            lines.append(f"at the end  {state_text(row['state'])}")
        elif row["step"] == "ceilings":
            lines.append(
                f"copy {row['copy_gbps']:.0f} GB/s  read {row['read_gbps']:.0f} GB/s  "
                f"bf16 {row['bf16_tops']:.0f} TFLOP/s  int8 {row['int8_tops']:.0f} TOP/s"
            )
    return "\n".join([*lines, gpu_goals.table(goals_of(rows))])


def goals_of(rows: Sequence[Row]) -> list[Row]:
    """The results of the goals."""
    return [row for row in rows if row["step"] == "goals"]


def run(out: Path, steps: Sequence[str], minutes: float) -> list[Row]:
    """Takes the steps that `out` does not have whole, and adds their results to it as they come."""
    done, until = read(out), monotonic() + 60 * minutes
    with out.open("a", encoding="utf-8") as file:
        for name in steps:
            if name in ("machine", "ceilings", "tune") and has(done, name):
                continue
            for row in STEPS[name](done, until):
                file.write(json.dumps(row) + "\n")
                file.flush()
                done.append(row)
    return done


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nybble.bench.gpu_run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines; goes on where it ends")
    parser.add_argument("--only", default=",".join(STEPS), metavar="STEP,...", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--minutes", type=float, default=6, help="nothing new starts after them")
    parser.add_argument("--report", action="store_true", help="show what the file has, and measure nothing")
    parser.add_argument("--markdown", action="store_true", help="of the report the table of goals alone, for a README")
    options = parser.parse_args(argv)
    try:
        steps, rows = steps_of(options.only), read(options.out)
    except ValueError as error:
        parser.error(str(error))
    if not options.report:
        if not torch.cuda.is_available():
            print("gpu_run: no CUDA device that torch can use", file=sys.stderr)
            return 1
        rows = run(options.out, steps, options.minutes)
    print(gpu_goals.markdown(goals_of(rows)) if options.markdown else report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
