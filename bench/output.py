"""Output of results: JSON lines to stdout or a file, or one table per cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..demo.table import text_table

Row = dict[str, Any]

_HEADERS = ("contestant", "scheme", "us", "p10-p90", "GB/s", "GOP/s", "roofline", "vs bf16", "vs peer")


def cell_table(rows: Sequence[Row]) -> str:
    """A table of the results of one cell, the fastest first, with a title."""
    first = rows[0]
    threads = f"{first['threads']} thread{'s' if first['threads'] > 1 else ''}"
    title = f"{first['n']}x{first['k']}  m={first['m']}  {first['dtype']}  {threads}  {first['cache']}"
    noise = f"A/A {first['spread']:.1%}" + (": NOISY" if first["noisy"] else "")
    lines = [
        (
            row["contestant"],
            row["scheme"] or f"{row['weight_bits']} bits",
            f"{row['us']:.1f}",
            f"{row['us_p10']:.1f}-{row['us_p90']:.1f}",
            f"{row['gbps']:.1f}",
            f"{row['gops']:.0f}",
            f"{row['roofline']:.0%} {row['bound']}",
            *(f"{row[name]:.2f}x" if row[name] else "" for name in ("vs_bf16", "vs_peer")),
        )
        for row in sorted(rows, key=lambda row: row["us"])
    ]
    return f"{title}  ({noise})\n{text_table(_HEADERS, lines, right=range(2, len(_HEADERS)))}\n"


def load(path: Path) -> list[Row]:
    """The lines of a result file.

    Raises:
        ValueError: a line is not a JSON object with a "kind".
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict) or "kind" not in row:
            raise ValueError(f"{path}:{number}: not a result line: lacks kind")
        rows.append(row)
    return rows


@contextmanager
def sink(out: Path | None, as_json: bool) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Yields a function that outputs the lines of a cell, to stdout and to the file `out`. as_json: JSON, not tables."""
    file = out.open("w", encoding="utf-8") if out else None
    shown: set[str] = set()

    def put(rows: Sequence[Row]) -> None:
        lines = [json.dumps(row) for row in rows]
        new = [line for line, row in zip(lines, rows, strict=True) if row["kind"] != "skip" or line not in shown]
        shown.update(new)
        if file:
            file.writelines(f"{line}\n" for line in new)
            file.flush()
        if as_json:
            print(*new, sep="\n", flush=True) if new else None
        else:
            _show([json.loads(line) for line in new])

    try:
        yield put
    finally:
        if file:
            file.close()


def _show(rows: Sequence[Row]) -> None:
    for row in rows:
        if row["kind"] == "skip":
            print(f"skipped {row['contestant']}: {row['reason']}", flush=True)
    results = [row for row in rows if row["kind"] == "result"]
    if results:
        print(cell_table(results), flush=True)
