"""Whole models in the bench: what is checked before it is timed, which goals are met, and the tables."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from nybble.bench import docs_results
from nybble.bench.contestants import WrongKernelError
from nybble.bench.setup import Setup
from nybble.bench.whole import files, lines, pipeline, race, run, show, suites
from nybble.bench.whole.contestant import Contestant
from nybble.bench.whole.goals import GOALS, OTHER, Goal, check, kind_of
from nybble.bench.whole.models import Model
from nybble.bench.whole.subject import Subject
from nybble.demo.table import markdown_table

cli = importlib.import_module("nybble.bench.__main__")


def ready(model, inputs):
    return lambda: model(inputs["x"]).detach()


def build():
    torch.manual_seed(0)
    return nn.Linear(8, 4)


SUBJECT = Subject(
    "toy",
    build,
    {"one": lambda: {"x": torch.ones(1, 8)}},
    lambda y, _: torch.as_tensor(y),
    ready=ready,
    steps={"one": 4},
)


def loads(change=lambda y: y, seconds=()):
    def load(subject, folder):
        model = subject.build()
        return lambda inputs: lambda: change(model(inputs["x"]).detach())

    return load


def contestant(name, change=lambda y: y, **more):
    return Contestant(name, loads(change), **{"least_cosine": 0.99, "peer": not name.startswith("nybble"), **more})


def write(subject, folder):
    (folder / "weights").write_bytes(bytes(2_000_000))


ABSENT = contestant("absent", needs=("no_such_module",), install="nothing")
TOY = Model(SUBJECT, (contestant("torch fp32"), contestant("nybble a"), ABSENT), (lines.COSINE,))


@pytest.fixture
def toy(monkeypatch):
    """The toy as the only model of the preset, whose files are written by this process."""
    monkeypatch.setitem(suites.SUITES, suites.WHOLE, suites.Suite({"toy": TOY}, GOALS))
    monkeypatch.setattr(files, "apart", lambda function, name, threads: function(name, threads))
    return TOY


def measured(done=(), only=()):
    rows, steps = [], []
    setup = Setup((), (), 0.001, {}, rows.extend, steps.append, done=done, only=only)
    return rows, steps, list(run.whole_models(setup))


def test_every_contestant_is_timed_once_for_each_case_and_the_absent_say_why(toy):
    rows, steps, texts = measured()
    found = {(row["quantity"], row["contestant"]): row for row in rows if row["kind"] == lines.KIND}
    assert found.keys() == {(q, c) for q in ("one", "cosine", "worst cosine") for c in ("torch fp32", "nybble a")}
    assert found["one", "torch fp32"]["rounds"] >= 5
    assert found["cosine", "nybble a"]["value"] == pytest.approx(1)
    assert [row for row in rows if row["kind"] == "skip"] == [
        {"kind": "skip", "contestant": "absent", "reason": "toy: no_such_module not installed (pip install nothing)"}
    ]
    assert steps == run.cells() == ["toy one", "toy cosine"]
    assert [row["kind"] for row in rows].count("whole-goal") == len(GOALS)
    assert "nybble a" in texts[0]
    assert "not run: absent" in texts[1]


def test_results_of_an_interrupted_run_are_not_measured_again(toy, monkeypatch):
    rows, _, _ = measured(only=["toy one"])
    assert {row["quantity"] for row in rows if row["kind"] == lines.KIND} == {"one"}
    monkeypatch.setattr(run, "times", lambda *_: pytest.fail("timed again"))
    again, _, _ = measured(done=rows)
    assert {row["quantity"] for row in again if row["kind"] == lines.KIND} == {"one", "cosine", "worst cosine"}


def test_the_time_is_that_of_a_step(toy, monkeypatch):
    monkeypatch.setattr(race, "in_turns", lambda runners, *_: ([race_timing(8.0)] * len(runners), 0.5))
    rows, _, _ = measured(only=["toy one"])
    row = next(row for row in rows if row["kind"] == lines.KIND)
    assert (row["value"], row["p10"], row["p90"], row["noisy"]) == (2.0, 2.0, 2.0, True)


def race_timing(seconds):
    return importlib.import_module("nybble.bench.timing").Timing(seconds, seconds, seconds, 7)


@pytest.mark.parametrize("change", [lambda y: -y, lambda y: y[:, :3], lambda y: y * torch.tensor([1, -1, 1, 1])])
def test_a_wrong_contestant_is_not_timed(change, tmp_path):
    entries = list(race.enter(SUBJECT, [contestant("torch fp32"), contestant("a peer", change)], tmp_path, 1))
    rows = race.times(SUBJECT, "one", entries, 0.001)
    assert [row["contestant"] for row in rows if row["kind"] == lines.KIND] == ["torch fp32"]
    assert [row["reason"][:6] for row in rows if row["kind"] == "skip"] == ["wrong:"]
    entries = list(race.enter(SUBJECT, [contestant("torch fp32"), contestant("nybble b", change)], tmp_path, 1))
    with pytest.raises(WrongKernelError, match=r"nybble b: toy: .*not timed"):
        race.times(SUBJECT, "one", entries, 0.001)


def test_a_peer_that_cannot_be_loaded_says_why_and_nybble_must_not_fail(tmp_path):
    def load(subject, folder):
        raise RuntimeError("no kernel\nand a long trace")

    found = list(race.enter(SUBJECT, [Contestant("a peer", load, 0.9)], tmp_path, 1))
    assert found == [{"kind": "skip", "contestant": "a peer", "reason": "toy: RuntimeError: no kernel"}]
    with pytest.raises(RuntimeError, match="no kernel"):
        list(race.enter(SUBJECT, [Contestant("nybble", load, 0.9, peer=False)], tmp_path, 1))


def test_files_are_written_once_and_only_whole(toy, monkeypatch, tmp_path):
    writes = []

    def failing(subject, folder):
        writes.append(folder)
        write(subject, folder)
        if len(writes) == 1:
            raise RuntimeError("interrupted")

    one = contestant("A peer 1.0", prepare=failing)
    monkeypatch.setitem(suites.SUITES, suites.WHOLE, suites.Suite({"toy": replace(TOY, contestants=(one,))}, ()))
    with pytest.raises(RuntimeError, match="interrupted"):
        files.prepared(tmp_path, SUBJECT, one, 1)
    folder = files.prepared(tmp_path, SUBJECT, one, 1)
    assert folder == files.prepared(tmp_path, SUBJECT, one, 1) == tmp_path / "toy" / "a-peer-1-0"
    assert len(writes) == 2
    assert files.megabytes(folder) == 2.0
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["a-peer-1-0"]
    disk = list(race.enter(SUBJECT, [one], tmp_path, 1))[1]
    assert (disk["quantity"], disk["value"]) == (lines.DISK, 2.0)


def test_files_are_kept_only_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv(files.FILES, str(tmp_path / "kept"))
    with files.room() as root:
        assert root == tmp_path / "kept"
    assert root.is_dir()
    monkeypatch.delenv(files.FILES)
    with files.room() as root:
        assert root.is_dir()
    assert not root.exists()


def test_a_pipeline_keeps_the_share_of_the_gain_that_its_own_work_leaves(monkeypatch, tmp_path):
    class Pipe:
        def __init__(self, model):
            self.model = model

        def encode(self, sentences, batch_size, show_progress_bar):
            return [self.model.forward(x=torch.ones(batch_size, 8)) for _ in range(0, len(sentences), batch_size)]

    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    found = []
    monkeypatch.setattr(pipeline, "_pipe", Pipe)
    monkeypatch.setattr(pipeline, "find_spec", lambda name: name)
    monkeypatch.setattr(pipeline, "loaded", lambda subject, folder: Net(8, 4))

    def in_turns(runners, budget_s):
        found.extend(len(runner.calls[0]()) for runner in runners)
        return [race_timing(seconds) for seconds in (10.0, 8.0, 3.0, 2.0)], 0.0

    monkeypatch.setattr(pipeline, "in_turns", in_turns)
    subject = replace(SUBJECT, build=lambda: Net(8, 4))
    (row,) = pipeline.pipeline(subject, TOY.contestants, tmp_path, 1)
    assert found == [2, 2, 2, 2]
    assert (row["contestant"], row["value"]) == ("nybble a", pytest.approx((10 / 3) / (8 / 2), rel=1e-4))
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    (skip,) = pipeline.pipeline(subject, TOY.contestants, tmp_path, 1)
    assert "sentence_transformers not installed" in skip["reason"]


def timed(contestant, value, quantity="one"):
    return lines.line("toy", quantity, contestant, not contestant.startswith("nybble"), value)


def goal(bound=1.5, **more):
    return Goal("toy", "one", {OTHER: bound}, **more)


def test_the_fastest_that_is_accurate_is_compared_with_the_fastest_peer():
    rows = [timed("nybble a", 2.0), timed("nybble b", 1.0), timed("p 1", 3.0), timed("p 2", 5.0)]
    rows += [timed("nybble a", 0.999, lines.COSINE), timed("nybble b", 0.9, lines.COSINE)]
    one = check(goal(over=("p 1", "p 2"), least_cosine=0.99), rows, "avx2")
    assert (one.value, one.ours, one.other, one.met) == (1.5, "nybble a", "p 1", True)
    assert check(goal(1.6, over=("p 1", "p 2"), least_cosine=0.99), rows, "avx2").met is False
    assert check(goal(over=("p 1",)), rows, "avx2").value == 3.0
    assert check(goal(over=("p 1",), ours=("nybble a",)), rows, "avx2").value == 1.5


def test_a_goal_without_a_peer_is_not_met_but_may_be_missed():
    rows = [timed("nybble a", 2.0), timed("p 1", 3.0)]
    some = check(goal(1.5, over=("p 1", "p 2")), rows, "avx2")
    assert (some.value, some.met, some.verdict) == (1.5, None, "not measured without p 2")
    assert check(goal(1.6, over=("p 1", "p 2")), rows, "avx2").verdict == "MISSED without p 2"
    none = check(goal(over=("p 2",)), rows, "avx2")
    assert (none.value, none.met, none.verdict) == (None, None, "not measured without p 2")
    assert check(goal(over=("p 1",), least_cosine=0.5), rows, "avx2").verdict == "not measured"


def test_upper_bounds_and_bounds_of_some_machines():
    rows = [timed("nybble a", 1.1), timed("p 1", 1.0)]
    assert check(goal(1.2, over=("p 1",), at_most=True), rows, "avx2").value == pytest.approx(1.1)
    assert check(goal(1.0, over=("p 1",), at_most=True), rows, "avx2").met is False
    assert check(goal(1.2, at_most=True), rows, "avx2").met is True
    assert check(goal(1.0), rows, "avx2").met is True
    only = Goal("toy", "one", {"avx2": 1.0})
    assert check(only, rows, "avx2").met is True
    assert check(only, rows, "avx512vnni").verdict == "no goal here"
    assert kind_of(("scalar", "avx2")) == "avx2"
    assert kind_of(("scalar", "avx2", "avx512vnni", "avx512bf16")) == "avx512vnni"
    assert kind_of(()) == OTHER


@pytest.mark.parametrize("preset", suites.SUITES)
def test_the_goals_name_what_is_measured(preset):
    suite = suites.SUITES[preset]
    for one in suite.goals:
        model = suite.models[one.model]
        assert one.quantity in (*model.subject.cases, *model.more, lines.DISK)
        names = [contestant.name for contestant in model.contestants]
        assert set(one.over) <= set(names)
        assert any(name.startswith("nybble") for name in names)


def test_the_bounds_of_whole_models():
    assert {(one.quantity, one.bounds[OTHER]) for one in GOALS if OTHER in one.bounds} == {
        ("batch 32", 1.3),
        ("batch 32", 1.4),
        ("batch 1", 1.25),
        ("batch 1", 4),
        ("start-up", 1.2),
        ("gain kept", 0.95),
        ("decode batch 1", 1.15),
        ("prefill 256", 2.5),
        ("decode batch 8", 2),
        ("resident over weights", 1.15),
        ("batch 1", 1.1),
        ("batch 8", 1.1),
        ("30 s", 1.1),
    }


def test_the_first_contestant_of_each_model_is_torch_in_fp32():
    models = [model for suite in suites.SUITES.values() for model in suite.models.values()]
    assert {model.contestants[0].name for model in models} == {"torch fp32"}
    assert len({model.subject.name for model in models}) == len(models)
    for model in models:
        names = [contestant.name for contestant in model.contestants]
        assert len(names) == len(set(names))


def test_tables_in_the_terminal_in_markdown_and_from_a_file(tmp_path, capsys):
    rows = [
        {"kind": "run", "cpu": "A CPU", "date": "2026-01-01", "commit": None, "targets": ["avx2"], "versions": {}}
        | {"ceilings": {"threads": {}}, "threads": [2]},
        *(lines.line("MiniLM", "batch 32", name, peer, value) for name, peer, value in TIMES),
        lines.line("MiniLM", lines.COSINE, "nybble w8a8", False, 0.9985),
        {"kind": "skip", "contestant": "openvino int8", "reason": "MiniLM: openvino not installed"},
    ]
    drawn = show.goals(rows, markdown_table).splitlines()
    first = next(line for line in drawn if "cosine >= 0.998" in line)
    assert first == "| MiniLM | batch 32, cosine >= 0.998 | w8a8 | onnxruntime int8 | 1.20x | >= 1.1x | met |"
    missed = next(line for line in drawn if "cosine >= 0.992" in line)
    assert missed.endswith("| 1.20x | >= 1.4x | MISSED |")
    table = show.models(rows, markdown_table)
    assert "| nybble w8a8 | 50 (4.00x) | 0.9985 |" in table[0]
    assert table[1] == "- not run: openvino int8: MiniLM: openvino not installed"
    path = tmp_path / "whole.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert cli.main(["report", "--markdown", str(path)]) == 0
    assert first in capsys.readouterr().out
    assert cli.main(["report", str(path)]) == 0
    out = capsys.readouterr().out
    assert "50 (4.00x)" in out
    assert "not run: openvino int8" in out
    assert "MISSED" in out
    assert docs_results.WHATS["whole-models"].markdown(rows).count("MISSED") == 1


TIMES = (("torch fp32", True, 0.2), ("nybble w8a8", False, 0.05), ("onnxruntime int8", True, 0.06))
