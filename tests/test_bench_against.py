"""The time of calls against that of another nybble: what it starts, refuses and counts."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import nybble
from nybble.bench import against

cli = importlib.import_module("nybble.bench.__main__")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    (tmp_path / "nybble").mkdir()
    (tmp_path / "nybble" / "__init__.py").write_text("")
    return tmp_path


def test_both_run_in_turn_and_ratios_are_of_rounds(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, asked = len(against.SCHEMES) * len(against.ROWS), []

    def times(place: Path) -> list[float]:
        asked.append(place == other.resolve())
        return [float(len(asked) + cell) for cell in range(cells)]

    monkeypatch.setattr(against, "_times", times)
    calls = list(against.measure(other, 3))
    assert asked == [True, False, False, True, True, False]
    assert len(calls) == cells
    assert (calls[0].before, calls[0].after) == ((1.0, 4.0, 5.0), (2.0, 3.0, 6.0))
    assert calls[0].ratios == [2.0, 0.75, 1.2]
    assert "1.200" in against.table(calls).splitlines()[2]
    assert "0.750 to 2.000" in against.table(calls)


def test_a_nybble_against_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(against, "_REPEATS", 3)
    assert cli.main(["against", str(Path(nybble.__file__).parents[1]), "--rounds", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(against.SCHEMES) * len(against.ROWS)


def test_what_is_no_nybble_is_refused(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["against", str(other / "nybble"), "--rounds", "1"]) == 1
    assert "must hold a nybble" in capsys.readouterr().err
    assert cli.main(["against", str(other), "--rounds", "1"]) == 1
    assert "nybble in" in capsys.readouterr().err
