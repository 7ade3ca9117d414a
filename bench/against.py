"""``against DIRECTORY``: the time of a call of a small layer by this nybble, over that by the nybble in another directory.

    pip install --target older 'git+https://...@COMMIT'
    python -m nybble.bench against older

Layers so small that the way to the kernel counts. The two run in turn, in one run, each time in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .. import native
from ..demo.table import text_table

SCHEMES, ROWS = ("w8a8", "w4a16g128", "w4a8g128"), (1, 16)
_REPEATS, _CALLS = 2000, 10
_HERE = Path(native.__file__).parents[2].resolve()
# It knows nothing of this nybble: it runs in the other one too.
_CHILD = """
import json, pathlib, sys, timeit, torch, nybble
place, schemes, rows, repeats, calls = json.loads(sys.argv[1])
assert pathlib.Path(nybble.__file__).is_relative_to(place), nybble.__file__
torch.set_num_threads(1)
torch.manual_seed(0)
found = []
with torch.inference_mode():
    for scheme in schemes:
        model = torch.nn.Sequential(torch.nn.Linear(256, 256))
        nybble.quantize(model, scheme, goal="memory", progress=False)
        for m in rows:
            x = torch.randn(m, 256)
            found.append(min(timeit.repeat(lambda: model[0](x), number=calls, repeat=repeats)) / calls)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Call:
    """A layer of 256x256: the microseconds of a call, of each round, by the other nybble and by this one."""

    scheme: str
    m: int
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Time here over time there, in each round."""
        return [after / before for before, after in zip(self.before, self.after, strict=True)]


def measure(other: Path, rounds: int) -> Iterator[Call]:
    """Calls by both, one thread; of 2,000 times ten calls in a process, the fastest ten.

    Raises:
        ValueError: ``other`` holds no nybble.
        ChildProcessError: a process failed; with its last line.
    """
    other = other.resolve()
    if not (other / "nybble" / "__init__.py").is_file():
        raise ValueError(f"{other}: must hold a nybble, as pip install --target leaves it")
    times: dict[Path, list[list[float]]] = {other: [], _HERE: []}
    for turn in range(rounds):
        for place in (other, _HERE) if turn % 2 == 0 else (_HERE, other):
            times[place].append(_times(place))
    cells = [(scheme, m) for scheme in SCHEMES for m in ROWS]
    for (scheme, m), before, after in zip(
        cells, *(zip(*times[place], strict=True) for place in (other, _HERE)), strict=True
    ):
        yield Call(scheme, m, before, after)


def _times(place: Path) -> list[float]:
    """Microseconds of each cell, in a new process."""
    task = json.dumps([str(place), SCHEMES, ROWS, _REPEATS, _CALLS])
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", _CHILD, task], cwd=place, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise ChildProcessError(f"nybble in {place}: {last}")
    return [1e6 * seconds for seconds in json.loads(done.stdout)]


def table(calls: list[Call]) -> str:
    """A line for each layer: medians of the rounds."""
    lines = [
        (
            call.scheme,
            str(call.m),
            f"{median(call.before):.2f}",
            f"{median(call.after):.2f}",
            f"{median(call.ratios):.3f}",
            f"{min(call.ratios):.3f} to {max(call.ratios):.3f}",
        )
        for call in calls
    ]
    return text_table(("256x256", "m", "us there", "us here", "ratio", "of the rounds"), lines, right=range(1, 6))
