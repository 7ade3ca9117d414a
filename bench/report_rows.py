"""Texts and table rows from result lines, for the text report and the HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from .report_cells import Row

# Key of a line of kind "model" -> (heading, number format).
MODEL_COLUMNS = {
    "decode_tokens_s": ("decode tokens/s", ".1f"),
    "prefill_tokens_s": ("prefill tokens/s", ".0f"),
    "decode_outside_ms": ("decode, other ms", ".1f"),
    "prefill_outside_ms": ("prefill, other ms", ".0f"),
    "weights_mb": ("weights MB", ".0f"),
    "peak_mb": ("peak MB", ".0f"),
}


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    """The lines of one kind, such as "run" or "model"."""
    return [row for row in rows if row["kind"] == kind]


def headline(run: Row) -> str:
    """CPU, date, commit and versions of a run."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"{run['cpu']}, {run['date']}, commit {run['commit'] or 'unknown'}\n{versions}"


def model_table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Headings and rows of the whole-model results; None if there are none."""
    models = of_kind(rows, "model")
    if not models:
        return None
    columns = {key: column for key, column in MODEL_COLUMNS.items() if all(key in row for row in models)}
    lines = [
        (row["contestant"], str(row["threads"]), *(format(row[key], how) for key, (_, how) in columns.items()))
        for row in models
    ]
    return ("model", "threads", *(heading for heading, _ in columns.values())), lines
