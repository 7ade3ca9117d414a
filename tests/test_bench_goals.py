"""Whether targets are met, and what changed between two files: from results made up here."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch

from nybble.bench import compare, figures, goal_tables, goals, held, peers, presets, run
from nybble.bench.goal_tables import AMX, AVX2, CPU, OVER_BF16, OVER_FP32, PEER, TABLES
from nybble.bench.goals import Goal, Table, check
from nybble.bench.peers.peer import Peer

cli = importlib.import_module("nybble.bench.__main__")

LIMITS = {"dram_gbps": 40, "dram_huge_gbps": 45, "l3_gbps": 200, "bf16_gflops": 900, "fp32_gflops": 500}
CEILINGS = {"threads": {"2": {**LIMITS, "int8_gops": 2000, "int7_gops": 2100, "int4_gops": 2200}}}


def row(scheme="w8a8", m=1, shape=(64, 32), **fields):
    name = f"nybble {scheme}" if scheme else "torch dynamic x86"
    base = {"kind": "result", "contestant": name, "peer": scheme is None, "scheme": scheme, "dtype": "bf16", "m": m}
    base |= {"n": shape[0], "k": shape[1], "threads": 2, "cache": "cold", "us": 100.0, "us_p10": 98.0, "us_p90": 103.0}
    base |= {"spread": 0.01, "vs_peer": 1.2, "best_peer": "the peer", "vs_bf16": 3.0, "gops": 1900.0, "roofline": 0.9}
    base |= {"pattern": None, "weight_bits": int(scheme[1]) if scheme else 8, "peak": 2000.0}
    return base | fields


def peer(name="a peer", m=1, shape=(64, 32), **fields):
    return row(None, m, shape, contestant=name, **fields)


def toy(*found, shapes=((64, 32),), **more):
    return Table("legend", (1, 4), tuple(shapes), goal_tables.MEASURES, found, **more)


# --- targets

TWO = ((64, 32), (8, 9))


def asked(table):
    """(scheme, what is compared) -> {M: bound} of a table."""
    found = {}
    for goal in table.goals:
        found.setdefault((goal.schemes[0], goal.measure), {})[goal.m] = goal.bound
    return found


def test_cpu_targets_are_those_that_were_asked_for():
    assert asked(CPU) == {
        ("w4a8g128", PEER): {1: 1.15, 4: 1.3, 16: 2.2, 64: 1.8, 256: 1.8},
        ("w4a16g128", PEER): {1: 1.0, 4: 1.2, 16: 1.3, 64: 1.1},
        ("w4a16g128", OVER_BF16): {256: 0.9},
        ("w8a8", PEER): {1: 1.0, 4: 1.1, 16: 1.3, 64: 1.2, 256: 1.08},
        ("w8a16", PEER): {1: 1.0, 4: 1.1},
        ("w8a16", OVER_BF16): {16: 1.2, 64: 1.0, 256: 0.9},
        ("w4a8g128", goal_tables.OF_BYTE_BOUND): {1: 1.15},
        ("w8a8", goal_tables.GOPS): {256: 1800},
    }
    assert set(CPU.schemes) == set(figures.SCHEMES)
    assert not CPU.by_mean


def test_avx2_and_amx_targets_are_those_that_were_asked_for():
    assert AVX2.ms == (1, 4, 16, 128, 1024)
    assert AVX2.by_mean
    assert len(AVX2.shapes) == 7
    bounds = {goal.label: {} for goal in AVX2.goals}
    for goal in AVX2.goals:
        bounds[goal.label][goal.m] = goal.bound
    assert list(bounds.values()) == [
        {1: 1.15, 4: 1.0, 16: 0.95, 128: 0.95, 1024: 0.95},
        {1: 1.15, 4: 1.15, 16: 1.15, 128: 1.1, 1024: 1.1},
        {1: 1.05, 4: 1.7, 16: 2, 128: 2.5, 1024: 2.5},
        {1: 1.5, 4: 1.2, 16: 1.2, 128: 1.35, 1024: 1.4},
        {128: 0.75, 1024: 0.75},
        {1: 5, 4: 5, 16: 2, 128: 1.05, 1024: 1.0},
        {1: 5, 4: 5, 16: 2, 128: 1.05, 1024: 1.0},
    ]
    assert asked(AMX) == {
        ("w8a8", OVER_BF16): {1: 1.0, 4: 1.0, 16: 1.0, 64: 1.3, 256: 1.3, 1024: 1.3},
        ("w8a8", goal_tables.ONEDNN): {64: 1.5, 256: 1.5, 1024: 1.5},
        ("w8a8", goal_tables.OF_PEAK): {1024: 0.5},
    }
    assert len(AMX.shapes) == 4


@pytest.mark.parametrize(("name", "table"), TABLES.items())
def test_every_table_is_complete(name, table):
    assert name in presets.PRESETS
    cells = [(goal.label, goal.m, goal.measure) for goal in table.goals]
    assert len(set(cells)) == len(cells)
    assert {goal.m for goal in table.goals} <= set(table.ms)
    assert {goal.measure for goal in table.goals} <= table.measures.keys()


@pytest.mark.parametrize(("by_mean", "met"), [(False, False), (True, True)])
def test_a_target_is_met_by_the_worst_shape_or_by_the_mean(by_mean, met):
    goal = Goal("w8a8", ("w8a8",), 1, PEER, 1.1)
    rows = [row(), peer("one", us=400.0), row(shape=(8, 9)), peer("other", shape=(8, 9), us=100.0)]
    rows += [peer("slow", shape=(8, 9), us=900.0), peer(weight_bits=4, us=1.0), row(m=4, us=1.0), peer(m=4, us=1.0)]
    checked = check(goal, toy(goal, shapes=TWO, by_mean=by_mean), rows)
    assert checked.mean == pytest.approx(2.0)
    assert (checked.worst, checked.worst_shape, checked.worst_peer, checked.met) == (1.0, "8x9", "other", met)


def test_baselines_are_found_by_name():
    rows = [row(us=10.0), peer("torch bf16", us=15.0), peer("torch dynamic onednn", us=20.0)]
    rows += [peer("onnxruntime dynamic int8", us=18.0), peer("torch fp32", us=30.0), peer("ggml q4_K", us=25.0)]
    rows += [peer("torch dynamic x86", us=40.0), peer("onnxruntime q4 b128 al4", us=26.0)]
    reached = {
        name: goal_tables.MEASURES[name].of(rows[0], rows) for name in {*goal_tables.MEASURES} - {goal_tables.OF_BYTES}
    }
    assert reached[OVER_BF16] == (1.5, "torch bf16")
    assert reached[goal_tables.INT8_PEER] == (1.8, "onnxruntime dynamic int8")
    assert reached[goal_tables.INT4_PEER] == (2.5, "ggml q4_K")
    assert reached[goal_tables.ONEDNN] == (2.0, "torch dynamic onednn")
    assert reached[goal_tables.OVER_FP32] == (3.0, "torch fp32")
    assert reached[goal_tables.DENSE] == (1.0, "nybble w8a8")
    assert reached[goal_tables.OF_PEAK] == (0.95, None)


@pytest.mark.parametrize("rows", [[], [row()], [peer()], [row("w4a8g128"), peer()]])
def test_what_was_not_measured_is_neither_met_nor_missed(rows):
    goal = Goal("w8a8", ("w8a8",), 1, PEER, 1.1)
    checked = check(goal, toy(goal), rows)
    assert (checked.met, checked.mean, checked.shapes) == (None, None, (0, 1))
    assert "- / 1.1x not measured" in goals.show(toy(goal), rows)


def test_a_part_of_the_shapes_is_shown_and_not_judged():
    goal = Goal("w8a8", ("w8a8",), 1, PEER, 1.1)
    table = toy(goal, shapes=TWO)
    assert check(goal, table, [row(), peer(us=100.0)]).met is None
    assert "1.00x (1.00x) / 1.1x (1 of 2 shapes)" in goals.show(table, [row(), peer(us=100.0)])


@pytest.mark.parametrize(("roofline", "met"), [(0.9, True), (0.86, False)])
def test_time_over_the_byte_bound_is_at_most_its_limit(roofline, met):
    goal = next(goal for goal in CPU.goals if goal.measure == goal_tables.OF_BYTE_BOUND)
    rows = [row("w4a8g128", roofline=0.99), row("w4a8g128", shape=(8, 9), roofline=roofline)]
    checked = check(goal, toy(goal, shapes=TWO), rows)
    assert checked.met is met
    assert (checked.worst, checked.worst_shape) == (pytest.approx(1 / roofline), "8x9")


@pytest.mark.parametrize(("gops", "met"), [(1800.0, True), (1799.0, False)])
def test_operations_are_at_least_their_limit(gops, met):
    goal = next(goal for goal in CPU.goals if goal.measure == goal_tables.GOPS)
    assert check(goal, toy(goal), [row(m=256, gops=gops)]).met is met


@pytest.mark.parametrize(
    ("cosine", "reached", "note"),
    [
        (0.9961, 2.0, "fast: cosine of MiniLM 0.9961 (>= 0.996), admitted"),
        (0.9959, 1.0, "fast: cosine of MiniLM 0.9959 (>= 0.996), not admitted"),
        (None, 2.0, "fast: cosine of MiniLM not measured (no model), admitted without it"),
    ],
)
def test_the_fastest_scheme_counts_that_is_accurate_enough(cosine, reached, note):
    goal = Goal("int8", ("w8a8", "fast"), 1, PEER, 1.1, least_cosine=0.996)
    rows = [row(), row(contestant="nybble fast", us=50.0) | {"scheme": "fast"}, peer(us=100.0)]
    rows += [{"kind": "cosine", "scheme": "fast", "cosine": cosine, "reason": "no model"}]
    assert check(goal, toy(goal), rows).mean == pytest.approx(reached)
    assert note in goals.show(toy(goal), rows)


def test_the_table_says_reached_worst_target_and_result():
    shapes = CPU.shapes
    rows = [row("w4a8g128", 4, shape, us=100.0 if shape[0] > 4096 else 80.0) for shape in shapes]
    rows += [peer("the peer", 4, shape, us=120.0, weight_bits=4) for shape in shapes]
    rows += [row("w8a16", 64, shape) for shape in shapes]
    rows += [peer("torch bf16", 64, shape, us=150.0, weight_bits=16) for shape in shapes]
    text = goals.show(CPU, rows)
    assert "1.42x (1.20x) / 1.3x MISSED" in text
    assert "1.50x (1.50x) / 1x* met" in text
    assert text.count("not measured") == len(CPU.goals) - 2
    assert "MISSED w4a8g128 M=4: 1.20x of the peer at 14336x4096" in text
    lines = [json.loads(json.dumps(checked.line())) for checked in goals.checks(CPU, rows)]
    assert {line["kind"] for line in lines} == {"target"}
    assert [line["met"] for line in lines if line["met"] is not None] == [False, True]


def test_a_table_names_the_peers_that_were_left_out():
    skips = [{"kind": "skip", "contestant": name, "reason": "no"} for name in ("ggml q4_0", "openvino int8")]
    text = goals.show(AVX2, skips)
    assert "left out: ggml q4_0: no" in text
    assert "openvino int8" not in text, "no goal needs it"


def test_report_shows_the_targets_of_a_file(tmp_path, capsys):
    run = {"kind": "run", "date": "2026-11-29", "commit": None, "cpu": "A CPU", "versions": {}, "preset": "cpu-targets"}
    run["ceilings"] = {"threads": {"2": {"dram_gbps": 40.0}}}
    rows = [row("w4a8g128", 4, shape, bound="memory", noisy=False) for shape in CPU.shapes]
    rows += [peer("the peer", 4, shape, us=140.0, weight_bits=4) for shape in CPU.shapes]
    extra = [checked.line() for checked in goals.checks(CPU, rows)] + [figures.Figure("f", 1.2, "x", 1.15).line()]
    path = write(tmp_path / "a", run, *rows, *extra)
    assert cli.main(["report", path, "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "| w4a8g128 | - / 1.15x not measured | 1.40x (1.40x) / 1.3x met |" in text
    assert "1.2x\\* not measured" in text
    assert cli.main(["report", path]) == 0
    assert "f: 1.2x (<= 1.15x) MISSED" in capsys.readouterr().out
    assert cli.main(["report", write(tmp_path / "b", *rows, *extra), "--markdown"]) == 0
    assert "1.40x (1.40x) / 1.3x met" in capsys.readouterr().out, "files of before do not name their preset"
    assert cli.main(["report", write(tmp_path / "c", *rows), "--markdown"]) == 1
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


# --- runs held to AVX2


@pytest.fixture
def wide_cpu(monkeypatch):
    """A CPU with AVX-512, and none of the variables that hold a run to AVX2."""
    monkeypatch.setattr(held.native, "cpu", lambda: ("A wide CPU", ("avx2", "fma", "f16c", "avx512f")))
    for name in (*held.VARIABLES, held.VOUCHED):
        monkeypatch.delenv(name, raising=False)


def test_the_avx2_preset_starts_itself_anew(monkeypatch, wide_cpu):
    class Started(Exception):
        pass

    def execve(path, command, environment):
        assert command[1:] == ["-m", "nybble.bench", "--preset", "avx2-targets"]
        assert environment.items() >= held.VARIABLES.items()
        raise Started

    monkeypatch.setattr(held.os, "execve", execve)
    with pytest.raises(Started):
        cli.main(["--preset", "avx2-targets"])
    for name, value in held.VARIABLES.items():
        monkeypatch.setenv(name, value)
    held.restart(["--preset", "avx2-targets"])


def test_only_a_cpu_with_more_than_avx2_is_held(monkeypatch, wide_cpu):
    assert held.mark() == {"held": "held to avx2 on A wide CPU"}
    monkeypatch.setattr(held.native, "cpu", lambda: ("An AVX2 CPU", ("avx2", "fma", "f16c")))
    monkeypatch.setattr(held.os, "execve", lambda *_: pytest.fail("started anew"))
    held.restart([])
    assert held.mark() == {}
    free = Peer("free", 8, "int8", (torch.float32,), lambda *_: [], needs=("onnxruntime",))
    assert held.admit([free]) == (free,)
    monkeypatch.setattr(held.native, "cpu", lambda: ("An old CPU", ("avx",)))
    assert cli.main(["--preset", "avx2-targets"]) == 1


def test_a_library_that_cannot_be_held_is_left_out_unless_vouched_for(monkeypatch, wide_cpu):
    free = Peer("free", 8, "int8", (torch.float32,), lambda *_: [], needs=("onnxruntime",))
    tame = Peer("tame", 8, "int8", (torch.float32,), lambda *_: [], needs=("torch",))
    one, other = held.admit([free, tame])
    assert "cannot be held to AVX2" in one.why_not()
    assert other.why_not() is None
    monkeypatch.setenv(held.VOUCHED, "ggml,onnxruntime")
    assert held.admit([free])[0].refused is None


def test_amx_targets_refuse_a_machine_without_amx(monkeypatch, capsys):
    machine = presets.targets.Machine("A CPU", (), ("torch", "scalar"), {"amx": "this CPU lacks amx_int8"}, None)
    monkeypatch.setattr(presets.targets, "detect", lambda: machine)
    setup = presets.Setup((), (), 1.0, {}, list, list)
    with pytest.raises(ValueError, match=r"this machine \(A CPU\) cannot run AMX kernels: this CPU lacks amx_int8"):
        next(presets.amx_targets(setup))


def test_the_avx2_preset_runs_resumes_and_runs_a_part(monkeypatch, tmp_path, capsys):
    shapes = ((32, 128), (16, 128))
    table = replace(AVX2, shapes=shapes, ms=(1,), goals=tuple(goal for goal in AVX2.goals if goal.m == 1))
    monkeypatch.setattr(presets, "AVX2", table)
    monkeypatch.setitem(presets.SETS, "minilm", shapes[1:])
    monkeypatch.setattr(presets, "cosines", lambda schemes: [
        {"kind": "cosine", "scheme": scheme, "cosine": 0.9989, "reason": None} for scheme in schemes])  # fmt: skip
    monkeypatch.setattr(run, "COLD_CACHES", 0)
    rows = []
    setup = presets.Setup(peers.matching("torch fp32"), (), 0.001, CEILINGS, rows.extend, lambda _: None)
    part = replace(setup, only=("32x128*",))
    (text,) = presets.avx2_targets(part)
    assert "(1 of 2 shapes)" in text
    results = [line for line in rows if line["kind"] == "result"]
    assert {(line["n"], line["cache"], line["dtype"]) for line in results} == {(32, "cold", "fp32")}
    done, rows[:] = list(rows), []
    (text,) = presets.avx2_targets(replace(setup, done=done))
    again = [line for line in rows if line["kind"] == "result"]
    assert again[: len(results)] == results, "kept, not measured anew"
    assert {(line["n"], line["cache"]) for line in again[len(results) :]} == {(16, "hot")}
    assert "w8a8: cosine of MiniLM 0.9989 (>= 0.996), admitted" in text
    assert "of 2 shapes" not in text
    assert {line["met"] for line in rows if line["kind"] == "target" and line["measure"] == OVER_FP32} <= {True, False}


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
