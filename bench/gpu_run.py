"""GPU benchmark run by gpu_goals.sh: ceilings, goals, other libraries, tuning. Writes JSON lines; prints a table at the end.

    python -m nybble.bench.gpu_run --out FILE [--only STEP,...] [--seconds N] [--first] [--dry-run]

Results already in FILE are not measured again, so an interrupted run can be continued. Delete a line to repeat it. If a
kernel fault makes the GPU unusable for this process, it ends with exit code 3; run it again for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import torch

from . import gpu_dry, gpu_goals, gpu_measure, gpu_tune
from .arguments import amount, argument
from .gpu_goals import FIRST, PEERS_OF, Goal, Limit
from .gpu_peers import PEERS
from .gpu_state import state, state_text
from .machine import commit, versions
from .shapes import SETS

Row = dict[str, Any]
# Time limit per result in seconds: a library that autotunes must not use up the time of all others.
RESULT_S = 30.0
# Exit code if another process is needed for the rest.
LOST = 3


@dataclass(frozen=True)
class Work:
    """What a run measures: goals and limits, and the shapes (m, n, k) at which every peer is timed."""

    goals: tuple[Goal | Limit, ...]
    peer_shapes: tuple[tuple[int, int, int], ...] = tuple((m, 8192, 8192) for m in (1, 16, 4096, 64, 256))

    @classmethod
    def whole(cls, first: bool) -> Work:
        """All goals and limits; first: including first-call limits, each of which needs a process."""
        return cls(tuple(goal for goal in gpu_goals.ALL if first or not (_is_first(goal))))

    def smaller(self) -> Work:
        """The same with reduced shapes, for dry runs."""
        goals = {}
        for goal in self.goals:
            m, n, k = gpu_dry.smaller(goal.m, goal.n, goal.k)
            little = replace(goal, m=m, n=n, k=k)
            goals[little.key] = little
        return Work(tuple(goals.values()), tuple(dict.fromkeys(gpu_dry.smaller(*shape) for shape in self.peer_shapes)))


def _is_first(goal: Goal | Limit) -> bool:
    return isinstance(goal, Limit) and goal.figure == FIRST


class DeviceLostError(RuntimeError):
    """A CUDA error made the GPU unusable for this process."""


class TookTooLongError(RuntimeError):
    """A result exceeded its time limit."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TookTooLongError after a time limit, as soon as Python code runs."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TookTooLongError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read(path: Path) -> list[Row]:
    """The results in a file; empty if it does not exist.

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
            raise ValueError(f"{path}:{number}: not a result: lacks step or key")
        rows.append(row)
    return rows


def machine_step(done: list[Row], until: float, work: Work) -> Iterator[Row]:
    """The GPU, driver, versions, and clocks before the run."""
    yield {
        "step": "machine",
        "key": "machine",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        **(_gpu() if gpu_measure.DEVICE == "cuda" else gpu_dry.GPU),
        "cuda": torch.version.cuda,
        "state": state(),
        "versions": versions(),
    }


def _gpu() -> Row:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def ceilings_step(done: list[Row], until: float, work: Work) -> Iterator[Row]:
    """The peak rates."""
    yield {"step": "ceilings", "key": "ceilings", **gpu_measure.ceilings()}


def goals_step(done: list[Row], until: float, work: Work) -> Iterator[Row]:
    """All goals and limits; a goal over the fastest of several peers first times these peers."""
    for goal in work.goals:
        if has(done, "goals", goal.key):
            continue
        if isinstance(goal, Goal) and goal.over in PEERS_OF:
            yield from _peers(PEERS_OF[goal.over], (goal.m, goal.n, goal.k), done, until)
        if monotonic() >= until:
            return
        with at_most(RESULT_S):
            row = gpu_measure.goal(goal, done) if isinstance(goal, Goal) else gpu_measure.limit(goal, done)
        yield row


def peers_step(done: list[Row], until: float, work: Work) -> Iterator[Row]:
    """All peers at a few shapes."""
    for shape in work.peer_shapes:
        yield from _peers([one.name for one in PEERS], shape, done, until)


def _peers(names: Sequence[str], shape: tuple[int, int, int], done: list[Row], until: float) -> Iterator[Row]:
    m, n, k = shape
    by_name = {one.name: one for one in PEERS}
    for name in names:
        key = f"{name} {n}x{k} m={m}"
        if monotonic() < until and not has(done, "peers", key):
            with at_most(RESULT_S):
                row = gpu_measure.peer(by_name[name], m, n, k)
            yield {"step": "peers", "key": key, "m": m, "n": n, "k": k, **row}


def tune_step(done: list[Row], until: float, work: Work) -> Iterator[Row]:
    """Tunes Triton configurations in the remaining time."""
    for row in gpu_tune.tune(SETS["llama-8b"], until):
        yield {"step": "tune", "key": f"{row['kernel']} {row['n']}x{row['k']} m={row['m']}", **row}


def end_step(done: list[Row], until: float, work: Work) -> Iterator[Row]:
    """The clocks after the run: lower than before means throttling."""
    yield {"step": "end", "key": "end", "state": state()}


STEPS: dict[str, Callable[[list[Row], float, Work], Iterator[Row]]] = {
    "machine": machine_step,
    "ceilings": ceilings_step,
    "goals": goals_step,
    "peers": peers_step,
    "tune": tune_step,
    "end": end_step,
}
# Steps that are complete once they have any result in the file.
_ONCE = ("machine", "ceilings", "tune")


def has(done: Sequence[Row], step: str, key: str | None = None) -> bool:
    """Whether `done` has a result of a step, or the one with `key`; results that were not tried do not count."""
    return any(row["step"] == step and key in (None, row["key"]) and row.get("ran", True) for row in done)


def steps_of(text: str) -> list[str]:
    """The named steps, in the order of STEPS.

    Raises:
        ValueError: a name is unknown.
    """
    wanted = text.split(",")
    unknown = [name for name in wanted if name not in STEPS]
    if unknown:
        raise ValueError(f"--only {','.join(unknown)}: must be one of {', '.join(STEPS)}")
    return [name for name in STEPS if name in wanted]


def report(rows: Sequence[Row], work: Work) -> str:
    """The results as text: machine, ceilings, goals, peers."""
    lines = []
    for row in rows:
        if row["step"] == "machine":
            lines.append(f"{row['gpu']}  CUDA {row['cuda']}  torch {row['versions']['torch']}  {row['date']}")
            lines.append(f"before  {state_text(row['state'])}")
        elif row["step"] == "end":
            lines.append(f"after  {state_text(row['state'])}")
        elif row["step"] == "ceilings":
            lines.append(
                f"copy {row['copy_gbps']:.0f} GB/s  read {row['read_gbps']:.0f} GB/s  "
                f"bf16 {row['bf16_tops']:.0f} TFLOP/s  int8 {row['int8_tops']:.0f} TOP/s"
            )
    peers = [f"{row['key']}  {row['reason'] if 'reason' in row else format(row['us'], '.1f') + ' us'}"
             for row in rows if row["step"] == "peers"]  # fmt: skip
    return "\n".join([*lines, gpu_goals.table(rows, work.goals), *peers])


def run(out: Path, steps: Sequence[str], seconds: float, work: Work) -> list[Row]:
    """Runs the steps that are incomplete in `out`, and appends their results as they come.

    Raises:
        DeviceLostError: a failed result, the last in `out`, made the GPU unusable for this process.
    """
    done, until = read(out), monotonic() + seconds
    with out.open("a", encoding="utf-8") as file:
        for name in steps:
            if (name in _ONCE and has(done, name)) or (name != "end" and monotonic() >= until):
                continue
            for row in STEPS[name](done, until, work):
                file.write(json.dumps(row) + "\n")
                file.flush()
                done.append(row)
                if "reason" in row and (error := gpu_measure.lasting_error()):
                    raise DeviceLostError(f"{row['key']}: the GPU is unusable for this process: {error}")
    return done


def summary(rows: Sequence[Row], work: Work, seconds: float) -> str:
    """The number of results, in one line."""
    done = {row["key"]: row for row in rows if row["step"] == "goals"}
    failed = sum("reason" in row for row in done.values())
    peers = [row for row in rows if row["step"] == "peers"]
    timed = sum("us" in row for row in peers)
    return f"goals: {len(done)} of {len(work.goals)} measured, {failed} failed, {timed} of {len(peers)} peers timed, {seconds:.0f} s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nybble.bench.gpu_run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON lines; an existing file is continued"
    )
    parser.add_argument("--only", default=",".join(STEPS), metavar="STEP,...", help=f"steps: {', '.join(STEPS)}")
    parser.add_argument("--seconds", type=argument(amount), default=360, help="no measurement starts after this time")
    parser.add_argument("--first", action="store_true", help="also time first calls, each in a new process")
    parser.add_argument("--report", action="store_true", help="show the results in the file without measuring")
    parser.add_argument("--markdown", action="store_true", help="show only the table of goals, as markdown")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU with small shapes and constant times")
    options = parser.parse_args(argv)
    begin, work = monotonic(), Work.whole(options.first or options.report)
    try:
        steps, rows = steps_of(options.only), read(options.out)
    except ValueError as error:
        parser.error(str(error))
    if options.dry_run:
        work = work.smaller()
    lost = None
    if not options.report:
        if not (torch.cuda.is_available() or options.dry_run):
            print("gpu_run: no CUDA device that torch can use", file=sys.stderr)
            return 1
        try:
            with gpu_dry.stand_in() if options.dry_run else nullcontext():
                rows = run(options.out, steps, options.seconds, work)
        except DeviceLostError as error:
            rows, lost = read(options.out), error
    print(gpu_goals.markdown(rows, work.goals) if options.markdown else report(rows, work))
    if not options.report:
        print(summary(rows, work, monotonic() - begin))
    if lost is not None:
        print(f"gpu_run: {lost}; run it again for the rest", file=sys.stderr)
        return LOST
    return 0


if __name__ == "__main__":
    code = main()
    if code == LOST:  # after such an error, torch's cleanup may abort the process with another exit code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
