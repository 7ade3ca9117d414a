"""Whether targets are met, from results made up here."""

from __future__ import annotations

import importlib
import json

import pytest

from nybble.bench import figures, goal_tables, goals, presets
from nybble.bench.goal_tables import AMX, AVX2, CPU, OVER_BF16, PEER, TABLES
from nybble.bench.goals import Goal, Table, check

cli = importlib.import_module("nybble.bench.__main__")


def row(scheme="w8a8", m=1, shape=(64, 32), **fields):
    name = f"nybble {scheme}" if scheme else "torch dynamic x86"
    base = {"kind": "result", "contestant": name, "peer": scheme is None, "scheme": scheme, "dtype": "bf16", "m": m}
    base |= {"n": shape[0], "k": shape[1], "threads": 2, "cache": "cold", "us": 100.0, "us_p10": 98.0, "us_p90": 103.0}
    base |= {"spread": 0.01, "vs_peer": 1.2, "best_peer": "the peer", "vs_bf16": 3.0, "gops": 1900.0, "roofline": 0.9}
    base |= {"pattern": None, "weight_bits": int(scheme[1]) if scheme else 8, "peak": 2000.0}
    return base | fields


def peer(name="a peer", m=1, shape=(64, 32), **fields):
    return row(None, m, shape, contestant=name, **fields)


def libraries(m=1, shape=(64, 32), **fields):
    """Slow peers of the libraries without which no peer is the best."""
    return [peer(name, m, shape, us=1e6, **fields) for name in ("onnxruntime q", "openvino q")]


def toy(*found, shapes=((64, 32),), **more):
    return Table("legend", (1, 4), tuple(shapes), goal_tables.MEASURES, found, **more)


TWO = ((64, 32), (8, 9))


def asked(table):
    """(scheme, what is compared) -> {M: bound} of a table."""
    found = {}
    for goal in table.goals:
        found.setdefault((goal.schemes[0], goal.measure), {})[goal.m] = goal.bound
    return found


def test_targets_of_other_libraries_weights_are_those_that_were_asked_for():
    bounds = {key: values for key, values in asked(goal_tables.FORMS).items() if any(values.values())}
    assert bounds == {
        ("w4ka8g32", goal_tables.OVER_Q4_K): {1: 1.0, 16: 1.5},
        ("w3a8g128", goal_tables.OVER_4_BITS): {1: 1.15, 16: None},
        ("w4nfa16g64", goal_tables.OVER_4_BITS_FLOAT): {1: 1.0, 16: 1.0},
    }
    mine = row("w3a8g128", us=50.0)
    cell = [mine, row("w4a8g128", us=60.0), row("w4a16g64", us=10.0), peer("ggml q4_K", us=5.0)]
    assert goal_tables.MEASURES[goal_tables.OVER_4_BITS].of(mine, cell).value == 1.2


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
    bounds = {goal.label: {} for goal in AVX2.goals if goal.bound is not None}
    for goal in AVX2.goals:
        if goal.bound is not None:
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
    rows += [*libraries(), *libraries(shape=(8, 9)), peer(weight_bits=4, us=1.0), row(m=4, us=1.0), peer(m=4, us=1.0)]
    checked = check(goal, toy(goal, shapes=TWO, by_mean=by_mean), rows)
    assert checked.mean == pytest.approx(2.0)
    assert (checked.worst, checked.worst_shape, checked.worst_peer, checked.met) == (1.0, "8x9", "other", met)


def test_baselines_are_found_by_name():
    rows = [row(us=10.0), peer("torch bf16", us=15.0), peer("torch dynamic onednn", us=20.0)]
    rows += [peer("onnxruntime dynamic int8", us=18.0), peer("torch fp32", us=30.0), peer("ggml q4_K", us=25.0)]
    rows += [peer("torch dynamic x86", us=40.0), peer("onnxruntime q4 b128 al4", us=26.0)]
    rows += [peer("onnxruntime q8 b128 al4", us=11.0), peer("ggml q8_0", us=12.0)]
    reached = {
        name: goal_tables.MEASURES[name].of(rows[0], rows) for name in {*goal_tables.MEASURES} - {goal_tables.OF_BYTES}
    }
    found = {name: (value.value, value.over) for name, value in reached.items() if value is not None}
    assert found.pop(OVER_BF16) == (1.5, "torch bf16")
    assert found.pop(goal_tables.INT8_PEER) == (1.8, "onnxruntime dynamic int8")
    assert found.pop("over onnxruntime q8") == (1.1, "onnxruntime q8 b128 al4")
    assert found.pop("over ggml q8_0") == (1.2, "ggml q8_0")
    assert found.pop(goal_tables.INT4_PEER) == (2.5, "ggml q4_K")
    assert found.pop(goal_tables.ONEDNN) == (2.0, "torch dynamic onednn")
    assert found.pop(goal_tables.OVER_FP32) == (3.0, "torch fp32")
    assert found.pop(goal_tables.DENSE) == (1.0, "nybble w8a8")
    assert found.pop(goal_tables.OF_PEAK) == (0.95, None)
    assert "over openvino int8" not in found, "it did not run"
    assert {name: value.absent for name, value in reached.items() if value is not None and value.absent} == {
        goal_tables.INT4_PEER: ("openvino int4 *",),
        PEER: ("openvino *",),
    }


@pytest.mark.parametrize("by_mean", [False, True])
@pytest.mark.parametrize(
    ("missing", "us", "met", "shown"),
    [
        ((), 120.0, True, "1.20x (1.20x) / 1.1x met"),
        ((), 105.0, False, "1.05x (1.05x) / 1.1x MISSED"),
        (("torch dynamic onednn",), 120.0, None, "1.20x (1.20x) / 1.1x without torch dynamic onednn"),
        (("torch dynamic onednn",), 105.0, False, "1.05x (1.05x) / 1.1x MISSED without torch dynamic onednn"),
    ],
)
def test_no_target_is_met_without_a_peer_that_it_names(by_mean, missing, us, met, shown):
    names = ("torch dynamic x86", "torch dynamic onednn", "onnxruntime dynamic int8")
    goal = Goal("w8a8", ("w8a8",), 1, goal_tables.INT8_PEER, 1.1)
    table = toy(goal, shapes=TWO, by_mean=by_mean)
    # At the other shape all of them ran.
    rows = [row(shape=(8, 9)), *(peer(name, shape=(8, 9), us=us) for name in names)]
    rows += [row(), *(peer(name, us=us) for name in names if name not in missing)]
    assert check(goal, table, rows).met is met
    assert f"| {shown} |" in goals.show(table, rows, markdown=True)
    assert check(goal, table, rows).line()["absent"] == missing


def test_other_int8_peers_are_shown_and_not_judged():
    rows = [line for shape in AVX2.shapes for line in (row(shape=shape), peer("openvino int8", shape=shape, us=50.0))]
    text = goals.show(AVX2, rows, markdown=True)
    assert "| w8a8 over openvino int8 | 0.50x (0.50x) |" in text
    assert "best int8 peer is the fastest of torch dynamic x86, torch dynamic onednn, onnxruntime dynamic int8;" in text
    assert "MISSED" not in text


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
        (None, 1.0, "fast: cosine of MiniLM not measured (no model), not admitted"),
    ],
)
def test_the_fastest_scheme_counts_that_is_accurate_enough(cosine, reached, note):
    goal = Goal("int8", ("w8a8", "fast"), 1, PEER, 1.1, least_cosine=0.996)
    rows = [row(), row(contestant="nybble fast", us=50.0) | {"scheme": "fast"}, peer(us=100.0)]
    rows += [{"kind": "cosine", "scheme": "fast", "cosine": cosine, "reason": "no model"}]
    rows += [{"kind": "cosine", "scheme": "w8a8", "cosine": 0.9989, "reason": None}]
    assert check(goal, toy(goal), rows).mean == pytest.approx(reached)
    assert note in goals.show(toy(goal), rows)


def test_a_scheme_of_unknown_cosine_does_not_count():
    goal = Goal("int8", ("w8a8", "w8a7"), 1, PEER, 1.1, least_cosine=0.996)
    rows = [row(), row("w8a7", us=50.0), peer(us=200.0), *libraries()]
    assert check(goal, toy(goal), rows).mean is None
    text = goals.show(toy(goal), rows)
    assert "w8a8: cosine of MiniLM not measured, not admitted" in text
    assert "- / 1.1x not measured" in text


def test_the_table_says_reached_worst_target_and_result():
    shapes = CPU.shapes
    rows = [row("w4a8g128", 4, shape, us=100.0 if shape[0] > 4096 else 80.0) for shape in shapes]
    rows += [peer("onnxruntime q4", 4, shape, us=120.0, weight_bits=4) for shape in shapes]
    rows += [row("w8a16", 64, shape) for shape in shapes]
    rows += [peer("torch bf16", 64, shape, us=150.0, weight_bits=16) for shape in shapes]
    text = goals.show(CPU, rows)
    assert "1.42x (1.20x) / 1.3x MISSED without openvino" in text
    assert "1.50x (1.50x) / 1x* met" in text
    assert text.count("not measured") == len(CPU.goals) - 2
    assert "MISSED w4a8g128 M=4: 1.20x of onnxruntime q4 at 14336x4096" in text
    lines = [json.loads(json.dumps(checked.line())) for checked in goals.checks(CPU, rows)]
    assert {line["kind"] for line in lines} == {"target"}
    assert [line["met"] for line in lines if line["met"] is not None] == [False, True]


def test_a_table_names_the_peers_that_were_left_out():
    skips = [{"kind": "skip", "contestant": name, "reason": "no"} for name in ("ggml q4_0", "torch int_mm")]
    text = goals.show(AVX2, skips)
    assert "left out: ggml q4_0: no" in text
    assert "torch int_mm" not in text, "no goal needs it"


def test_report_shows_the_targets_of_a_file(tmp_path, capsys):
    run = {"kind": "run", "date": "2026-11-29", "commit": None, "cpu": "A CPU", "versions": {}, "preset": "cpu-targets"}
    run["ceilings"] = {"threads": {"2": {"dram_gbps": 40.0}}}
    rows = [row("w4a8g128", 4, shape, bound="memory", noisy=False) for shape in CPU.shapes]
    rows += [peer("the peer", 4, shape, us=140.0, weight_bits=4) for shape in CPU.shapes]
    rows += [line for shape in CPU.shapes for line in libraries(4, shape, weight_bits=4, bound="memory", noisy=False)]
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


def write(path, *rows):
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return str(path)
