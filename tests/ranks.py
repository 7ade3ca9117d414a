"""Runs checks on several processes that are ranks of one gloo group; they meet by a file, not by a port.

A file of checks is a script that ends with ``ranks.main(checks, prepare)``. ``Group(script, ranks)`` runs it in as many processes
and tells what each check gave; all checks share the processes, which take seconds to start.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

LIMIT = 600  # seconds for all checks of a script
OK = "ok"
FOLDER = Path(__file__).parent

Check = Callable[[Path], None]


def checks(script: str) -> list[str]:
    """The names in CHECKS of a script of this folder, which is not imported: ranks run it."""
    tree = ast.parse((FOLDER / script).read_text(encoding="utf-8"))
    (found,) = (
        one.value for one in tree.body if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "CHECKS"
    )
    return [one.id for one in found.generators[0].iter.elts]


class Group:
    """The outcomes of the checks of a script, by name: "ok", or the traceback of the first rank that failed."""

    def __init__(self, script: Path, ranks: int, folder: Path, only: Iterable[str] = ()) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, str(script), str(ranks), str(folder), ",".join(only)]
        logs = [folder / f"log{rank}" for rank in range(ranks)]
        found = []
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                found.append(subprocess.Popen([*command, str(rank)], env=env, stdout=out, stderr=out))
        try:
            for process in found:
                process.wait(LIMIT)
        finally:
            for process in found:
                process.kill()
        self._rows = [_rows(folder / f"rank{rank}.json") for rank in range(ranks)]
        self._logs = "".join(f"--- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs))

    def outcome(self, check: str) -> str:
        """What the check gave on all ranks."""
        told = [row.get(check, f"rank {rank} did not finish\n{self._logs}") for rank, row in enumerate(self._rows)]
        return next((one for one in told if one != OK), OK)


def _rows(path: Path) -> dict[str, str]:
    return json.loads(path.read_text()) if path.exists() else {}


def main(checks: dict[str, Check]) -> None:
    """Run the checks of a script as one rank of a group, until one fails: the ranks would no longer be in step."""
    ranks, folder, only, rank = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=LIMIT // 2))
    rows: dict[str, str] = {}
    for name in only.split(",") if only else checks:
        torch.manual_seed(0)
        try:
            checks[name](folder)
            rows[name] = OK
        except BaseException:
            rows[name] = f"rank {rank}:\n{traceback.format_exc()}"
            raise
        finally:
            (folder / f"rank{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()
