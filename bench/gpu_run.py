"""The measured part of gpu_goals.sh: ceilings, goals and peers, tuning; JSON lines, and a table last.

    python -m nybble.bench.gpu_run --out FILE [--only STEP,...] [--seconds N] [--first] [--dry-run]

What FILE already has is not measured again: a run that was cut off goes on where it was. Delete a line to repeat it.
A kernel whose fault makes CUDA useless for this process ends it with exit code 3; run it again for what is left.
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
# A result that takes longer is given up: a library that tunes itself must not take the time of all others.
RESULT_S = 30.0
# The exit code where another process is needed for the rest.
LOST = 3


@dataclass(frozen=True)
class Work:
    """What a run measures: goals and limits, and the rows, outputs and inputs at which every peer is timed."""

    goals: tuple[Goal | Limit, ...]
    peer_shapes: tuple[tuple[int, int, int], ...] = tuple((m, 8192, 8192) for m in (1, 16, 4096, 64, 256))

    @classmethod
    def whole(cls, first: bool) -> Work:
        """All that there is; first: with the limits of first calls, of which each takes a process."""
        return cls(tuple(goal for goal in gpu_goals.ALL if first or not (_is_first(goal))))

    def smaller(self) -> Work:
        """Each goal on a shape that a CPU multiplies at once."""
        goals = {}
        for goal in self.goals:
            m, n, k = gpu_dry.smaller(goal.m, goal.n, goal.k)
            little = replace(goal, m=m, n=n, k=k)
            goals[little.key] = little
        return Work(tuple(goals.values()), tuple(dict.fromkeys(gpu_dry.smaller(*shape) for shape in self.peer_shapes)))


def _is_first(goal: Goal | Limit) -> bool:
    return isinstance(goal, Limit) and goal.figure == FIRST


class DeviceLostError(RuntimeError):
    """CUDA refuses everything more in this process."""


class TookTooLongError(RuntimeError):
    """A result that was given up."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TookTooLongError in what runs longer, where Python gets to run at all."""

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


def machine_step(done: list[Row], until: float, work: Work) -> Iterator[Row]:
    """The GPU, its driver, its clocks before anything runs, and the versions."""
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
    """What nothing exceeds."""
    yield {"step": "ceilings", "key": "ceilings", **gpu_measure.ceilings()}


def goals_step(done: list[Row], until: float, work: Work) -> Iterator[Row]:
    """Every goal and every limit; before a goal over the fastest of several peers, those."""
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
    """Every peer on a few shapes."""
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
    """Configurations, in what time is left."""
    for row in gpu_tune.tune(SETS["llama-8b"], until):
        yield {"step": "tune", "key": f"{row['kernel']} {row['n']}x{row['k']} m={row['m']}", **row}


def end_step(done: list[Row], until: float, work: Work) -> Iterator[Row]:
    """The clocks after all that: lower ones than at first were throttled."""
    yield {"step": "end", "key": "end", "state": state()}


STEPS: dict[str, Callable[[list[Row], float, Work], Iterator[Row]]] = {
    "machine": machine_step,
    "ceilings": ceilings_step,
    "goals": goals_step,
    "peers": peers_step,
    "tune": tune_step,
    "end": end_step,
}
# Once in a file, and not in pieces.
_ONCE = ("machine", "ceilings", "tune")


def has(done: Sequence[Row], step: str, key: str | None = None) -> bool:
    """Whether a step, or one result of it, is there already: not a result that was not tried."""
    return any(row["step"] == step and key in (None, row["key"]) and row.get("ran", True) for row in done)


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


def report(rows: Sequence[Row], work: Work) -> str:
    """What was measured, as text: the machine, its ceilings, the goals, the peers."""
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
    peers = [f"{row['key']}  {row['reason'] if 'reason' in row else format(row['us'], '.1f') + ' us'}"
             for row in rows if row["step"] == "peers"]  # fmt: skip
    return "\n".join([*lines, gpu_goals.table(rows, work.goals), *peers])


def run(out: Path, steps: Sequence[str], seconds: float, work: Work) -> list[Row]:
    """Takes the steps that `out` does not have whole, and adds their results to it as they come.

    Raises:
        DeviceLostError: after a result that failed, which is the last in `out`, CUDA refuses everything more.
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
                    raise DeviceLostError(f"{row['key']}: CUDA refuses everything more in this process: {error}")
    return done


def summary(rows: Sequence[Row], work: Work, seconds: float) -> str:
    """How much there is, in a line."""
    done = {row["key"]: row for row in rows if row["step"] == "goals"}
    failed = sum("reason" in row for row in done.values())
    peers = [row for row in rows if row["step"] == "peers"]
    timed = sum("us" in row for row in peers)
    return f"goals: {len(done)} of {len(work.goals)} measured, {failed} failed, {timed} of {len(peers)} peers timed, {seconds:.0f} s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nybble.bench.gpu_run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines; goes on where it ends")
    parser.add_argument("--only", default=",".join(STEPS), metavar="STEP,...", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--seconds", type=argument(amount), default=360, help="nothing new starts after them")
    parser.add_argument("--first", action="store_true", help="first calls too, each in a process of its own")
    parser.add_argument("--report", action="store_true", help="show what the file has, and measure nothing")
    parser.add_argument("--markdown", action="store_true", help="of the report the table of goals alone, for a README")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, on small shapes, with a clock that stands still"
    )
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
    if code == LOST:  # what torch frees at the end may abort the process after such an error, with another code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
