"""Numbers on the bench's command lines: what is no sensible number is refused in one line, before anything runs."""

from __future__ import annotations

import importlib

import pytest

from nybble.bench import arguments

INTEGER, NUMBER = "must be an integer above 0", "must be a number above 0"


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("__main__", ["--m", "0"], INTEGER),
        ("__main__", ["--m", "4,,8"], INTEGER),
        ("__main__", ["--threads", "two"], INTEGER),
        ("__main__", ["--budget", "0"], NUMBER),
        ("__main__", ["--budget", "3600"], "must be below 3600 seconds"),
        ("__main__", ["compare", "a", "b", "--fail-over", "nan"], NUMBER),
        ("gpu_host", ["--calls", "0"], INTEGER),
        ("gpu_host", ["--repeats", "-1"], INTEGER),
        ("gpu_run", ["--out", "x", "--seconds", "0"], NUMBER),
        ("gpu_tune", ["--minutes", "inf"], NUMBER),
        ("gpu_tune", ["--shapes", "8x"], "must be NxK or one of"),
        ("gpu_smoke", ["--jobs", "0"], INTEGER),
        ("gpu_smoke", ["--limit", "-5"], NUMBER),
        ("gpu_wheels", ["x", "--most", "much"], NUMBER),
    ],
)
def test_wrong_numbers_are_refused_in_one_line(
    script: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"nybble.bench.{script}").main
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: argument --" in last
    assert message in last


def test_numbers_are_read() -> None:
    assert arguments.counts("1, 16") == [1, 16]
    assert arguments.amount("0.5") == 0.5
