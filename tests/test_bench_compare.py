"""What changed between two files of results, made up here."""

from __future__ import annotations

import importlib
import json

import pytest

from nybble.bench import compare

cli = importlib.import_module("nybble.bench.__main__")


def row(scheme="w8a8", m=1, **fields):
    """A result line of a kernel; only what is compared."""
    cell = {"dtype": "bf16", "m": m, "n": 64, "k": 32, "threads": 2, "cache": "cold"}
    times = {"us": 100.0, "us_p10": 98.0, "us_p90": 103.0, "spread": 0.01}
    return {"kind": "result", "contestant": f"nybble {scheme}", "peer": False, "scheme": scheme} | cell | times | fields


def change(before, after):
    (found,) = compare.changes([row(**before)], [row(**after)])
    return found


def around(us):
    return {"us": us, "us_p10": us * 0.98, "us_p90": us * 1.03}


@pytest.mark.parametrize(
    ("after", "result"),
    [
        (around(120.0), "slower"),
        (around(80.0), "faster"),
        (around(100.5), ""),
        ({**around(120.0), "spread": 0.3}, ""),  # within the A/A spread
        ({**around(120.0), "us_p10": 95.0}, ""),  # within the deciles
    ],
)
def test_a_change_counts_beyond_the_noise(after, result):
    assert change({}, after).result == result


def test_only_common_results_are_compared():
    before = [{"kind": "run"}, row(), row(m=4), row("w8a16")]
    after = [row("w8a16", us=50.0), row(m=16), row(), {"kind": "skip"}]
    found = compare.changes(before, after)
    assert [(c.key[1], c.key[3]) for c in found] == [("w8a8", 1), ("w8a16", 1)]
    assert "w8a16" in compare.text(found)


def write(path, *rows):
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return str(path)


@pytest.mark.parametrize(
    ("after", "percent", "code"),
    [
        (row(**around(120.0)), "10", 1),
        (row(**around(120.0)), "30", 0),
        (row(**around(80.0)), "10", 0),
        (row(**around(120.0), peer=True), "10", 1),  # what it was before counts
    ],
)
def test_compare_fails_where_nybble_is_slower(after, percent, code, tmp_path, capsys):
    files = [write(tmp_path / "a", row()), write(tmp_path / "b", after)]
    assert cli.main(["compare", *files, "--fail-over", percent]) == code
    assert cli.main(["compare", *files]) == 0
    capsys.readouterr()


def test_a_slower_peer_is_no_failure(tmp_path, capsys):
    files = [write(tmp_path / "a", row(peer=True)), write(tmp_path / "b", row(**around(200.0), peer=True))]
    assert cli.main(["compare", *files, "--fail-over", "5"]) == 0
    assert "slower" in capsys.readouterr().out


def test_files_with_nothing_in_common_are_refused(tmp_path, capsys):
    files = [write(tmp_path / "a", row()), write(tmp_path / "b", row(m=4))]
    assert cli.main(["compare", *files]) == 1
    assert "no results in common" in capsys.readouterr().err
