"""Result lines of whole models: one number of one contestant each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

KIND = "whole"
COSINE, WORST_COSINE, SAME_TOP_1, DISK, START, RESIDENT, KEPT = (
    "cosine",
    "worst cosine",
    "same top-1",
    "MB on disk",
    "start-up",
    "resident over weights",
    "gain kept",
)


def line(model: str, quantity: str, contestant: str, peer: bool, value: float, **more: Any) -> dict[str, Any]:
    """A line. value: seconds of a case and of starting up; else what the quantity says."""
    return {
        "kind": KIND,
        "model": model,
        "quantity": quantity,
        "contestant": contestant,
        "peer": peer,
        "value": float(f"{value:.5g}"),
        **more,
    }


def of(rows: Iterable[Row], model: str, quantity: str) -> list[Row]:
    """The lines of a quantity of a model."""
    return [row for row in rows if row["kind"] == KIND and (row["model"], row["quantity"]) == (model, quantity)]


def models(rows: Iterable[Row]) -> list[str]:
    """The models that were measured, in order."""
    return list(dict.fromkeys(row["model"] for row in rows if row["kind"] == KIND))


def value_of(rows: Sequence[Row], model: str, quantity: str, contestant: str) -> float | None:
    """The value of a contestant; None if it was not measured."""
    return next((row["value"] for row in of(rows, model, quantity) if row["contestant"] == contestant), None)
