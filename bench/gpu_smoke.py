"""Checks every kernel on this GPU; the first thing to run on a new one. The last line is a summary.

    python -m nybble.bench.gpu_smoke [--jobs N] [--only GLOB,...] [--small] [--limit SECONDS] [--out FILE] [--dry-run]

Each kernel runs in its own process, because a kernel fault makes the GPU unusable for its process: three shapes in each
supported dtype, symmetric and asymmetric weights, two calls each, compared with float64. Another process reports the
occupancy of the CUDA kernels. Six timings follow, with nothing else running. For a failing kernel, the details of its
first failure are shown. --dry-run does all this on the CPU, with one kernel of each kind.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from time import monotonic
from typing import Any

from ..dispatch.registry import all_specs, kernels
from ..dispatch.spec import KernelSpec
from .arguments import amount, argument, count
from .gpu_smoke_check import DTYPES, INSTANCES, OPERATIONS, SHAPES, TIMES, cases, schemes

Row = dict[str, Any]
JOBS, LIMIT_S, PROCESS_S = 10, 140.0, 120.0
SHOWN = 6  # failed cases shown per kernel
# Assumed times for the estimate, in seconds, on a machine with an H100 and 16 cores: start of Python with torch and a CUDA
# context; one Triton compilation; one check of a small shape, of the large shape; the timings; the occupancy query.
START_S, COMPILE_S, CHECK_S, LARGE_S, TIMES_S, INSTANCES_S = 10.0, 2.5, 0.1, 1.0, 30.0, 12.0


@dataclass
class Outcome:
    """The output of a process. died: why it ended early, or ""."""

    name: str
    seconds: float
    rows: list[Row] = field(default_factory=list)
    died: str = ""

    @property
    def results(self) -> list[Row]:
        """The results, each with its case."""
        found, case = [], ""
        for row in self.rows:
            if row.keys() == {"case"}:
                case = row["case"]
            else:
                found.append({"case": case, **row})
        return found

    @property
    def wrong(self) -> list[Row]:
        """The failed results."""
        return [row for row in self.results if "wrong" in row]

    @property
    def failed(self) -> bool:
        """Whether a result failed, the process died, or there are no results."""
        return bool(self.wrong or self.died or not self.results)


def of_gpus() -> list[KernelSpec]:
    """All kernels for GPUs, of every op."""
    return [spec for spec in all_specs() if spec.device == "cuda"]


def one_of_each(specs: Iterable[KernelSpec]) -> list[KernelSpec]:
    """One kernel per target and op."""
    return list({(spec.target, spec.op): spec for spec in specs}.values())


def cost(spec: KernelSpec) -> float:
    """Estimated seconds of a kernel's process. Triton compiles for each scheme, dtype and number of rows."""
    if spec.op in OPERATIONS:
        return START_S + len(OPERATIONS[spec.op]) * (COMPILE_S + CHECK_S)
    found = cases(spec, False, DTYPES)
    large = sum((case.n, case.k) == SHAPES[-1] for case in found)
    compiled = len(schemes(spec)[:2]) * len(DTYPES) * len(SHAPES) if spec.target == "triton" else 0
    return START_S + compiled * COMPILE_S + len(found) * CHECK_S + large * LARGE_S


def estimate(specs: Sequence[KernelSpec], jobs: int) -> float:
    """Estimated seconds of the whole run, with the occupancy query and the longest processes first."""
    busy = [0.0] * jobs
    for seconds in (INSTANCES_S, *sorted(map(cost, specs), reverse=True)):
        busy[busy.index(min(busy))] += seconds
    return max(busy) + TIMES_S


def run_one(what: str, flags: Sequence[str], until: float) -> Outcome:
    """Runs a process of gpu_smoke_check within the remaining time."""
    begin = monotonic()
    seconds = min(PROCESS_S, until - begin)
    if seconds <= 0:
        return Outcome(what, 0.0, died="no time left")
    environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": "1", "OMP_NUM_THREADS": "1"}
    if "--dry-run" in flags:
        environment["TRITON_INTERPRET"] = "1"
    if what == TIMES:
        del environment["CUDA_LAUNCH_BLOCKING"]
    command = [sys.executable, "-m", "nybble.bench.gpu_smoke_check", what, *flags]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=seconds, check=False)  # noqa: S603
        output, errors, died = done.stdout, done.stderr, _how_it_ended(done.returncode)
    except subprocess.TimeoutExpired as late:
        output, errors, died = late.stdout or b"", late.stderr or b"", f"took more than {seconds:.0f} s"
    outcome = Outcome(what, monotonic() - begin, _rows(output.decode(errors="replace")))
    if died:
        last = outcome.rows[-1].get("case") if outcome.rows else "startup"
        lines = errors.decode(errors="replace").strip().splitlines() or ["no output"]
        outcome.died = f"{died} in {last or 'shutdown'}: {lines[-1]}"
    return outcome


def _how_it_ended(code: int) -> str:
    return "" if code == 0 else f"signal {-code}" if code < 0 else f"exit {code}"


def _rows(text: str) -> list[Row]:
    """The complete JSON lines of a process's output."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]


def kernel_text(outcome: Outcome) -> str:
    """One line for a correct kernel; details of the first failure for another."""
    results, wrong = outcome.results, outcome.wrong
    if not outcome.failed:
        worst = max(row["ok"] for row in results)
        return (
            f"ok      {outcome.name}  {len(results)} cases, at most {worst:.2f} of the bound, {outcome.seconds:.1f} s"
        )
    lines = [f"FAILED  {outcome.name}  {len(wrong)} of {len(results)} cases, {outcome.seconds:.1f} s"]
    if outcome.died:
        lines.append(f"        died: {outcome.died}")
    if wrong:
        lines += [f"        {name}: {value}" for name, value in wrong[0].items()]
    lines += [f"        also {row['case']}: {row['wrong']}" for row in wrong[1:SHOWN]]
    return "\n".join(lines)


def plain_text(outcome: Outcome) -> str:
    """The rows of a process that does not check a kernel."""
    lines = ["  ".join(f"{name} {value}" for name, value in row.items()) for row in outcome.results]
    return "\n".join([f"== {outcome.name}", *lines, *([f"died: {outcome.died}"] if outcome.died else [])])


def smoke(specs: Sequence[KernelSpec], flags: Sequence[str], jobs: int, until: float) -> list[Outcome]:
    """Runs all processes, and prints each outcome as it comes. The timings run alone, in time reserved for them."""

    def shown(text: Callable[[Outcome], str], what: str, end: float) -> Outcome:
        outcome = run_one(what, flags, end)
        print(text(outcome), flush=True)
        return outcome

    longest = [spec.name for spec in sorted(specs, key=cost, reverse=True)]
    with ThreadPoolExecutor(jobs) as pool:
        instances = pool.submit(shown, plain_text, INSTANCES, until - TIMES_S)
        kernels = list(pool.map(lambda name: shown(kernel_text, name, until - TIMES_S), longest))
    return [instances.result(), *kernels, shown(plain_text, TIMES, until)]


def usable(specs: Iterable[KernelSpec]) -> list[KernelSpec]:
    """The kernels that can run here; prints why others cannot."""
    found, reasons = [], {row["name"]: row["why_not"] for row in kernels()}
    for spec in specs:
        if reasons[spec.name] is None:
            found.append(spec)
        else:
            print(f"skipped {spec.name}  {reasons[spec.name]}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nybble.bench.gpu_smoke", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=argument(count), default=JOBS, help="parallel processes")
    parser.add_argument("--only", metavar="GLOB,...", help="kernels; default: all, in a dry run one of each kind")
    parser.add_argument("--small", action="store_true", help="small shapes only")
    parser.add_argument(
        "--limit", type=argument(amount), default=LIMIT_S, metavar="SECONDS", help="time limit of the whole run"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON lines")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU, with small shapes")
    options = parser.parse_args(argv)
    begin = monotonic()
    patterns = (options.only or "*").split(",")
    specs = [spec for spec in of_gpus() if any(fnmatchcase(spec.name, pattern) for pattern in patterns)]
    if not specs:
        parser.error(f"--only {options.only}: matches no kernel for GPUs")
    if options.dry_run:
        specs, flags = specs if options.only else one_of_each(specs), ["--dry-run", "--small"]
    else:
        specs, flags = usable(specs), ["--small"] if options.small else []
    outcomes = smoke(specs, flags, options.jobs, begin + options.limit)
    if options.out:
        rows = [{"name": o.name, "seconds": o.seconds, "died": o.died, "results": o.results} for o in outcomes]
        options.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    failed = sum(outcome.failed for outcome in outcomes)
    spent, guess = monotonic() - begin, estimate(specs, options.jobs) if specs else 0.0
    print(f"smoke: {len(specs)} kernels, {failed} failed, {spent:.0f} s (estimate {guess:.0f} s)", flush=True)
    return 1 if failed or not specs else 0


if __name__ == "__main__":
    sys.exit(main())
