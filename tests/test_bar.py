"""The progress bar: on a terminal, and only for work that takes long."""

from __future__ import annotations

import builtins
import copy
import inspect
import io
import itertools
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

import nybble
from nybble.model import bar as module
from nybble.model.bar import PATIENCE_S, bar
from nybble.recipe.recipe import Stage

ShownOn = Callable[[io.StringIO], io.StringIO]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the time is, in seconds."""
    now = [100.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def shown_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[io.StringIO], io.StringIO]:
    """Makes a stream this process's stderr. In the test itself: pytest sets its own before each."""

    def show(stream: io.StringIO) -> io.StringIO:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        return stream

    return show


def work(clock: list[float], seconds: float, wanted: bool | None) -> None:
    with bar(4, wanted) as advance:
        for i in range(4):
            clock[0] += seconds / 4
            advance(f"step {i}")


@pytest.mark.parametrize("kind", [Terminal, io.StringIO], ids=["terminal", "pipe"])
@pytest.mark.parametrize("wanted", [None, True, False])
@pytest.mark.parametrize("seconds", [PATIENCE_S - 0.1, PATIENCE_S + 0.1])
def test_a_bar_is_shown_on_a_terminal_for_long_work(
    kind: type[io.StringIO], shown_on: ShownOn, clock: list[float], seconds: float, wanted: bool | None
) -> None:
    stderr = shown_on(kind())
    work(clock, seconds, wanted)
    expected = wanted or (wanted is None and stderr.isatty() and seconds > PATIENCE_S)
    assert ("step 3" in stderr.getvalue()) == (bool(expected) and stderr.isatty())
    if not expected:
        assert stderr.getvalue() == ""


def test_a_bar_counts_the_steps_before_it_was_shown(shown_on: ShownOn, clock: list[float]) -> None:
    shown = shown_on(Terminal())
    with bar(3) as advance:
        advance("one")
        clock[0] += PATIENCE_S
        assert shown.getvalue() == ""
        advance("two")
        assert "two" in shown.getvalue()
        assert "2/3" in shown.getvalue()


def test_the_terminal_is_as_before_after_an_error(shown_on: ShownOn, clock: list[float]) -> None:
    stderr = shown_on(Terminal())

    def fail() -> None:
        with bar(2) as advance:
            clock[0] += 2 * PATIENCE_S
            advance("one")
            raise RuntimeError("work")

    with pytest.raises(RuntimeError, match="work"):
        fail()
    assert stderr.getvalue().count("\x1b[?25l") == stderr.getvalue().count("\x1b[?25h") == 1, (
        "the cursor is shown again"
    )


def test_without_a_stderr_there_is_no_bar(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    work(clock, 10, None)


@pytest.mark.parametrize("kind", [Terminal, io.StringIO], ids=["terminal", "pipe"])
@pytest.mark.parametrize("wanted", [None, True])
def test_without_rich_a_line_is_written_over(
    kind: type[io.StringIO], wanted: bool | None, shown_on: ShownOn, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = shown_on(kind())
    real = builtins.__import__

    def absent(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", absent)
    work(clock, 10, wanted)
    shown = [text.rstrip() for text in stderr.getvalue().split("\r")]
    assert "\n" not in stderr.getvalue()
    assert shown[-3:] == (["step 3 4/4", "", ""] if stderr.isatty() else [""])


PASSES = ("evaluate", "optimize", "plan", "quantize", "recover", "sensitivity", "sparsify")


@pytest.mark.parametrize("name", [*PASSES, "load_pretrained"])
def test_every_pass_decides_by_the_terminal_unless_told(name: str) -> None:
    assert inspect.signature(getattr(nybble, name)).parameters["progress"].default is None


@pytest.mark.parametrize(
    "call",
    [
        lambda model, data: nybble.evaluate(model, None, data, progress=1),
        lambda model, data: nybble.optimize(model, nybble.Recipe((Stage("quantize", {}),)), progress=1),
        lambda model, data: nybble.plan(model, "w8a8", data, budget={"bytes": 1e9}, progress=1),
        lambda model, data: nybble.quantize(model, progress=1),
        lambda model, data: nybble.recover(model, copy.deepcopy(model), data, progress=1),
        lambda model, data: nybble.sensitivity(model, "w8a8", data, progress=1),
        lambda model, data: nybble.sparsify(model, "2:4", calibration=data, progress=1),
    ],
    ids=PASSES,
)
def test_progress_is_a_flag_or_none(call: Callable[[nn.Module, list[torch.Tensor]], object]) -> None:
    with pytest.raises(TypeError, match="progress=1: must be True, False or None"):
        call(nn.Sequential(nn.Linear(8, 8)), [torch.randn(4, 8)])


def test_a_pass_shows_its_bar_on_a_terminal(shown_on: ShownOn, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(step=PATIENCE_S)
    monkeypatch.setattr(module, "monotonic", lambda: next(ticks))
    stderr = shown_on(Terminal())
    nybble.quantize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), goal="memory")
    assert "2/2" in stderr.getvalue()
    stderr = shown_on(io.StringIO())
    nybble.quantize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), goal="memory")
    assert stderr.getvalue() == ""
