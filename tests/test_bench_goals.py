"""Whether targets are met, and what changed between two files: from results made up here."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from nybble.bench import compare, figures, goals, presets
from nybble.bench.goals import BF16, LIMITS, PEER, TARGETS, Target, check

cli = importlib.import_module("nybble.bench.__main__")


def row(scheme="w8a8", m=1, shape=(64, 32), **fields):
    base = {
        "kind": "result",
        "contestant": f"nybble {scheme}",
        "peer": False,
        "scheme": scheme,
        "dtype": "bf16",
        "m": m,
    }
    base |= {"n": shape[0], "k": shape[1], "threads": 2, "cache": "cold", "us": 100.0, "us_p10": 98.0, "us_p90": 103.0}
    base |= {"spread": 0.01, "vs_peer": 1.2, "best_peer": "the peer", "vs_bf16": 3.0, "gops": 1900.0, "roofline": 0.9}
    return base | fields


# --- targets


def test_the_table_has_every_family_at_every_m():
    assert len({(t.scheme, t.m) for t in TARGETS}) == len(TARGETS) == 4 * len(goals.MS)
    assert {t.scheme for t in TARGETS} == set(figures.SCHEMES)
    dense = {(t.scheme, t.m) for t in TARGETS if t.baseline == BF16}
    assert dense == {("w4a16g128", 256), ("w8a16", 16), ("w8a16", 64), ("w8a16", 256)}


def test_a_target_is_met_only_where_its_worst_shape_meets_it():
    target = Target("w8a8", 1, PEER, 1.1)
    rows = [row(vs_peer=4.0), row(shape=(8, 9), vs_peer=1.0, best_peer="other"), row(m=4, vs_peer=0.1), row("w8a16")]
    checked = check(target, rows)
    assert checked.mean == pytest.approx(2.0)
    assert (checked.worst, checked.worst_shape, checked.worst_peer, checked.met) == (1.0, "8x9", "other", False)
    assert check(target, [row(vs_peer=1.1)]).met is True


def test_a_target_over_bf16_looks_at_bf16():
    checked = check(Target("w8a16", 16, BF16, 1.2), [row("w8a16", 16, vs_peer=9.0, vs_bf16=1.1)])
    assert (checked.worst, checked.worst_peer, checked.met) == (1.1, "torch bf16", False)


@pytest.mark.parametrize("rows", [[], [row(vs_peer=None)], [row(), row(shape=(8, 9), vs_peer=None)]])
def test_what_was_not_measured_is_neither_met_nor_missed(rows):
    assert check(Target("w8a8", 1, PEER, 1.1), rows).met is None


@pytest.mark.parametrize(("roofline", "met"), [(0.9, True), (0.86, False)])
def test_time_over_the_byte_bound_is_at_most_its_limit(roofline, met):
    rows = [row("w4a8g128", roofline=0.99), row("w4a8g128", shape=(8, 9), roofline=roofline)]
    checked = check(LIMITS[0], rows)
    assert checked.met is met
    assert (checked.worst, checked.worst_shape) == (pytest.approx(1 / roofline), "8x9")


@pytest.mark.parametrize(("gops", "met"), [(1800.0, True), (1799.0, False)])
def test_operations_are_at_least_their_limit(gops, met):
    assert check(LIMITS[1], [row(m=256, gops=2000.0), row(m=256, gops=gops)]).met is met


def test_the_table_says_reached_worst_target_and_result():
    rows = [row("w4a8g128", 4, vs_peer=1.4), row("w4a8g128", 4, (8, 9), vs_peer=1.2)]
    rows += [row("w8a16", 64, vs_bf16=1.5)]
    found = goals.checks(rows)
    text = goals.table(found)
    assert "1.30x (1.20x) / 1.3x MISSED" in text
    assert "1.50x (1.50x) / 1x* met" in text
    assert text.count("not measured") == len(TARGETS) + len(LIMITS) - 2
    assert "MISSED w4a8g128 M=4: 1.20x of the peer at 8x9" in text
    assert all(json.loads(json.dumps(checked.line()))["kind"] == "target" for checked in found)


def test_report_shows_the_targets_of_a_file(tmp_path, capsys):
    rows = [row("w4a8g128", 4, vs_peer=1.4, bound="memory", noisy=False)]
    extra = [checked.line() for checked in goals.checks(rows)] + [figures.Figure("f", 1.2, "x", 1.15).line()]
    path = write(tmp_path / "a", *rows, *extra)
    assert cli.main(["report", path, "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "| w4a8g128 | - / 1.15x not measured | 1.40x (1.40x) / 1.3x met |" in text
    assert "1.2x\\* not measured" in text
    assert cli.main(["report", path]) == 0
    assert "f: 1.2x (<= 1.15x) MISSED" in capsys.readouterr().out
    assert cli.main(["report", write(tmp_path / "b", *rows), "--markdown"]) == 1
    assert "must be from --preset" in capsys.readouterr().err


# --- the other figures


def test_figures_have_a_result_on_either_side():
    assert figures.Figure("f", 1.1, "x", 1.15).met
    assert not figures.Figure("f", 1.2, "x", 1.15).met
    assert figures.Figure("f", 1.9, "x", 1.85, at_most=False).met
    assert not figures.Figure("f", 1.8, "x", 1.85, at_most=False).met
    assert str(figures.Figure("f", 1.8, "x", 1.85, at_most=False)) == "f: 1.8x (>= 1.85x) MISSED"
    assert figures.Figure("f", 1.1, "x", 1.15).line()["met"] is True


def test_every_figure_is_named_and_computed(monkeypatch):
    asked = []

    def duel(cases, m, dtype, cache, budget_s):
        asked.append((m, dtype, cache, torch.get_num_threads()))
        return [1e-6 * n * k for _, (n, k) in cases]

    monkeypatch.setattr(figures, "duel", duel)
    before = torch.get_num_threads()
    found = [figure for run in figures.FIGURES for figure in run(1.0)]
    assert torch.get_num_threads() == before
    assert len({figure.name for figure in found}) == len(found)
    values = {figure.name: figure.value for figure in found}
    assert values["4095x4097 over 4096x4096 M=256 w8a8, per operation"] == pytest.approx(1.0)
    assert values["64x64 M=1 fp32 w8a8, module call"] == pytest.approx(4096)
    assert {1, 2} <= {threads for m, _, _, threads in asked if m == 256}


def test_model_figures_from_lines():
    rows = [{"contestant": "torch bf16", "decode_tokens_s": 16.0, "prefill_tokens_s": 600.0}]
    assert list(figures.model(rows)) == []
    rows.append({"contestant": "nybble w4a8g128", "decode_tokens_s": 80.0, "prefill_tokens_s": 900.0})
    assert [(figure.value, figure.met) for figure in figures.model(rows)] == [
        (80.0, True),
        (5.0, True),
        (900.0, False),
        (1.5, False),
    ]


def test_odd_shapes_are_large_enough_to_count():
    assert all(m * n * k > 10**7 for (n, k), _, m in figures.ODD)


def test_a_duel_checks_and_times_each_case():
    seconds = figures.duel([("w8a8", (33, 64)), ("w4a8g32", (32, 64))], 3, torch.float32, "hot", 1e-9)
    assert len(seconds) == 2
    assert min(seconds) > 0


def test_avx2_figures_from_results():
    rows = [row(m=1, roofline=0.9), row(m=256, us=100.0), row(None, 256, contestant="torch fp32", us=240.0)]
    fp32, share = presets._avx2_figures(rows)
    assert (fp32.value, fp32.met) == (pytest.approx(2.4), False)
    assert (share.value, share.met) == (pytest.approx(0.9), True)


def test_the_avx2_preset_starts_itself_anew(monkeypatch):
    class Started(Exception):
        pass

    def execve(path, command, environment):
        assert command[1:] == ["-m", "nybble.bench", "--preset", "avx2-targets"]
        assert environment.items() >= presets.AVX2.items()
        raise Started

    monkeypatch.setattr(presets.os, "execve", execve)
    monkeypatch.delenv("NYBBLE_TARGET", raising=False)
    with pytest.raises(Started):
        cli.main(["--preset", "avx2-targets"])


# --- compare


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
