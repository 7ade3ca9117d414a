"""The bench for GPUs, as far as a machine without one can tell: arithmetic, tables, what a run goes on from."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

from nybble.bench import gpu_dry, gpu_first, gpu_measure, gpu_operations, gpu_run, gpu_state, gpu_tune
from nybble.bench.gpu_goals import (
    ALL,
    BF16,
    FIGURES,
    FIRST,
    GOALS,
    HOST,
    LIMITS,
    OF_COPY,
    PEERS_OF,
    UNMEASURED,
    W4A16,
    Goal,
    markdown,
    table,
)
from nybble.bench.gpu_peers import PEERS
from nybble.bench.gpu_timing import CACHE_BYTES, copies, rounds, summarize
from nybble.bench.weights import WeightKind
from nybble.dispatch.registry import specs
from nybble.weights.scheme import Scheme

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

MACHINE = {
    "step": "machine",
    "key": "machine",
    "gpu": "NVIDIA H100 80GB HBM3",
    "cuda": "13.0",
    "versions": {"torch": "2.11"},
    "date": "a day",
    "state": {
        "driver": "580.1",
        "sm_mhz": "345",
        "sm_mhz_most": "1980",
        "memory_mhz": "3201",
        "celsius": "30",
        "watts": "80",
    },
}
WORK = gpu_run.Work.whole(first=True)
CEILINGS = {"step": "ceilings", "key": "ceilings", "copy_gbps": 4300.0, "read_gbps": 4100.0}
CEILINGS |= {"bf16_tops": 790.0, "int8_tops": 1400.0}


def reached(goal: Goal, us: float, over_us: float) -> dict:
    shape = {"m": goal.m, "n": goal.n, "k": goal.k, "over": goal.over}
    times = {"us": us, "us_p20": us - 0.1, "us_p80": us + 0.1, "again_us": 1.02 * us, "over_us": over_us}
    return {"step": "goals", "key": goal.key, **shape, **times, "runs": "w4a16_triton"}


# --- timing


@pytest.mark.parametrize("nbytes", [1, 4096, 1 << 20, 33 << 20, 60 << 20, 61 << 20, 1 << 30])
def test_copies_fill_the_cache_three_times(nbytes: int) -> None:
    count = copies(nbytes)
    assert count * nbytes >= 3 * CACHE_BYTES
    assert count == 1 or (count - 1) * nbytes < 3 * CACHE_BYTES
    assert copies(0) >= 1


def test_a_graph_has_at_least_twenty_calls_and_whole_rounds() -> None:
    assert [rounds(calls) for calls in (1, 3, 19, 20, 21, 500)] == [20, 7, 2, 1, 1, 1]


def test_quantiles_are_microseconds() -> None:
    sample = summarize([i * 1e-6 for i in (9, 1, 5, 3, 7, 11)])
    assert sample.us_p20 < sample.us < sample.us_p80
    assert summarize([2e-6]).us == pytest.approx(2)
    with pytest.raises(ValueError, match="must not be empty"):
        summarize([])


# --- goals


def test_goals_are_of_schemes_and_peers_that_exist() -> None:
    assert len({goal.key for goal in (*GOALS, *LIMITS)}) == len(GOALS) + len(LIMITS)
    peers = {peer.name for peer in PEERS}
    for goal in GOALS:
        WeightKind.parse(goal.scheme)
        assert goal.over in peers | PEERS_OF.keys()
        assert min(goal.h100, goal.h200) > 0
        if goal.over == "torch int_mm":
            assert goal.m > 16, "which it refuses"


def test_the_table_shows_what_was_reached_missed_failed_and_not_measured() -> None:
    first, second, third, fourth = GOALS[:4]
    rows = [MACHINE, reached(first, 10, 100), reached(second, 10, 10), {"key": third.key, "reason": "off by 3"}]
    lines = table(rows).splitlines()[-len(ALL) :]
    assert lines[0].endswith("met")
    assert "10.00x" in lines[0]
    assert lines[1].endswith("MISSED")
    assert lines[2].endswith("off by 3")
    assert lines[3].endswith(UNMEASURED)
    assert fourth.scheme in lines[3]


def test_the_table_for_a_readme_has_every_goal_and_what_was_reached() -> None:
    lines = markdown().splitlines()[2:]
    assert all(line.endswith(f"| {UNMEASURED} |  |") for line in lines)
    aims = [aim for line in lines for aim in line.split(" | ")[3].split("; ")]
    assert len(aims) == len(GOALS) + len(LIMITS)
    first, last = GOALS[0], ALL[-1]
    share = {"roofline": {"read": 0.71, "bf16": 0.02}}
    rows = [MACHINE, {**reached(first, 10, 100), **share}, {"key": last.key, "reason": "off by 3"}]
    lines = markdown(rows).splitlines()[2:]
    assert lines[0].startswith(f"| {first.scheme} | 8192x8192 | torch bf16 | M=1 3.00x / 3.20x; ")
    assert lines[0].endswith("| M=1 10.00x met | M=1 71% read |")
    assert lines[-1].endswith(f"| M={last.m} off by 3 |  |")


@pytest.mark.parametrize(
    ("gpu", "said"),
    [("NVIDIA H100 80GB HBM3", "met"), ("NVIDIA H200", "MISSED"), ("NVIDIA RTX 5090", "3.10x")],
)
def test_the_name_of_the_gpu_chooses_the_goal(gpu: str, said: str) -> None:
    goal = GOALS[0]
    assert (goal.h100, goal.h200) == (3.0, 3.2)
    rows = [{**MACHINE, "gpu": gpu}, reached(goal, 10, 31)]
    line = next(line for line in table(rows).splitlines() if "3.10x" in line)
    assert line.rstrip().endswith(said)
    assert f"M=1 3.10x {said}".removesuffix(" 3.10x") in markdown(rows)
    assert "met" not in table(rows[1:]), "results that do not name their GPU are not checked"


def bytes_of(goal: Goal) -> float:
    """Bytes of a weight, scales and places of a quad included."""
    bits = {"w4a16g128": 4.125, "w4a8g128": 4.125, "w8a8": 8, "sp24w8a16": 5, "sp24w4a16g128": 3.25, "sp24w16a16": 9}
    return goal.n * goal.k * bits[goal.scheme] / 8


@pytest.mark.parametrize(
    "goal", [goal for goal in GOALS if goal.m == 1 and goal.over == BF16], ids=lambda goal: goal.key
)
def test_goals_of_an_h100_for_a_token_follow_from_its_bandwidth(goal: Goal) -> None:
    microseconds = {"w8a8": 2.5}.get(goal.scheme, 0) + 3 + bytes_of(goal) / (0.9 * 3.0e6)
    dense = 1.7 + 2 * goal.n * goal.k / (0.95 * 3.0e6)
    assert goal.h100 == math.floor(10 * dense / microseconds) / 10


def test_goals_over_other_libraries_are_over_the_fastest_that_ran() -> None:
    goal = next(goal for goal in GOALS if goal.over == W4A16)
    shape = {"step": "peers", "m": goal.m, "n": goal.n, "k": goal.k}
    slow, fast, failed = PEERS_OF[W4A16][:3]
    rows = [{**shape, "peer": slow, "us": 9.0}, {**shape, "peer": fast, "us": 5.0}]
    rows += [{**shape, "peer": failed, "reason": "broken"}, {**shape, "m": 999, "peer": failed, "us": 1.0}]
    where = {"m": goal.m, "n": goal.n, "k": goal.k}
    assert gpu_measure.fastest(W4A16, where, rows) == {"over_us": 5.0, "fastest": fast}
    assert gpu_measure.fastest(W4A16, where, rows[2:3]) == {"reason": f"{failed}: broken"}
    assert gpu_measure.fastest(W4A16, where, []) == {"reason": "none was timed", "ran": False}
    row = {**reached(goal, 4, 5), "fastest": fast}
    assert f"1.25x met ({fast})" in " ".join(table([MACHINE, row]).split())


def test_a_product_is_shown_as_a_share_of_its_ceilings() -> None:
    kind, measured = WeightKind.parse("w8a8"), {"us": 1.0, "gbps": 2050.0, "tops": 140.0}
    found = gpu_measure.roofline(kind, measured, [CEILINGS])["roofline"]
    assert found == {"read": pytest.approx(0.5), "int8": pytest.approx(0.1)}
    assert gpu_measure.roofline(kind, measured, []) == {}
    assert gpu_measure.roofline(kind, {"reason": "none"}, [CEILINGS]) == {}


def test_the_report_names_the_machine_and_its_ceilings() -> None:
    peers = [{"step": "peers", "key": "one", "us": 3.25}, {"step": "peers", "key": "other", "reason": "broken"}]
    text = gpu_run.report([MACHINE, CEILINGS, reached(GOALS[0], 10, 100), *peers], WORK)
    assert text.splitlines()[-2:] == ["one  3.2 us", "other  broken"]
    machine, state, ceilings, *_ = text.splitlines()
    assert machine == "NVIDIA H100 80GB HBM3  CUDA 13.0  torch 2.11  a day"
    assert state == "before  driver 580.1  SM 345 of 1980 MHz  memory 3201 MHz  30 C  80 W"
    assert ceilings.startswith("copy 4300 GB/s  read 4100 GB/s")
    assert text.count(UNMEASURED) == len(ALL) - 1


def test_limits_are_of_figures_and_operations_that_exist() -> None:
    for limit in LIMITS:
        assert limit.figure in FIGURES
        if limit.figure in (HOST, FIRST):
            WeightKind.parse(limit.what)
        else:
            name, _, scheme = limit.what.partition(" ")
            assert callable(getattr(gpu_operations.quantize_triton, name, gpu_operations.dequantize_triton.dequantize))
            assert (name == "dequantize") == bool(scheme)
    of_copy = [limit for limit in LIMITS if limit.figure == OF_COPY and limit.kernel == "K5"]
    assert all(2 * limit.m * limit.k >= 32 << 20 for limit in of_copy)


@pytest.mark.parametrize(
    ("figure", "good", "bad", "texts"),
    [
        (
            OF_COPY,
            {"gbps": 3600.0, "copy_gbps": 4300.0},
            {"gbps": 3000.0, "copy_gbps": 4300.0},
            (">= 80%", "84%", "70%"),
        ),
        (HOST, {"host_us": 5.5}, {"host_us": 6.1}, ("<= 6.00", "5.50", "6.10")),
        (FIRST, {"first_s": 1.25}, {"first_s": 2.5}, ("<= 2.00", "1.25", "2.50")),
    ],
)
def test_the_table_judges_limits(figure: str, good: dict, bad: dict, texts: tuple[str, ...]) -> None:
    limit = next(limit for limit in LIMITS if limit.figure == figure)
    lines = [
        next(
            line
            for line in table([MACHINE, {"key": limit.key, **row}]).splitlines()
            if line.endswith((" met", " MISSED"))
        )
        for row in (good, bad)
    ]
    assert lines[0].endswith(f"{texts[0]}  {texts[1]:>7}  met")
    assert lines[1].endswith(f"{texts[0]}  {texts[2]:>7}  MISSED")


def test_a_limit_is_measured_beside_the_copy_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = next(limit for limit in LIMITS if limit.figure == OF_COPY)
    assert gpu_measure.limit(limit, [])["reason"] == "no ceilings in this file"
    monkeypatch.setattr(gpu_operations, "operation", lambda *_, **shape: {"us": 1.0, "gbps": 4000.0})
    row = gpu_measure.limit(limit, [CEILINGS])
    assert (row["gbps"], row["copy_gbps"], row["key"]) == (4000.0, 4300.0, limit.key)

    def fails(*_: object, **shape: int) -> dict:
        raise RuntimeError("not the weight\nand more")

    monkeypatch.setattr(gpu_operations, "operation", fails)
    assert gpu_measure.limit(limit, [CEILINGS])["reason"] == "not the weight"


@no_gpu
@pytest.mark.parametrize(
    "what",
    [
        "dequantize w8a16",
        "dequantize w4a16g128",
        "dequantize sp24w4a16g128",
        "quantize",
        "rms_norm_quantize",
        "silu_mul_quantize",
    ],
)
def test_operations_are_checked_before_they_are_timed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_operations.gpu_timing, "copies", lambda nbytes: 2)
    calls, moved = gpu_operations.calls(what, 4, 128, 256, device="cpu")
    assert len(calls) == 2
    assert moved > (2 * 128 * 256 if what.startswith("de") else 4 * 256)
    calls[1]()
    module = gpu_operations.dequantize_triton if what.startswith("de") else gpu_operations.quantize_triton
    name = what.split()[0]
    right = getattr(module, name)

    def wrong(*arguments):
        got = right(*arguments)
        tensor = got if torch.is_tensor(got) else got.codes
        tensor += 2
        return got

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(RuntimeError, match="not timed"):
        gpu_operations.calls(what, 4, 128, 256, device="cpu")
    with pytest.raises(ValueError, match="what='nothing'"):
        gpu_operations.calls("nothing", 1, 1, 1)


def test_the_first_call_is_of_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert 0 < gpu_first.first_call("w8a8", 1, 64, 64, device="cpu") < 30
    asked = {}

    def process(command, env, **options):
        asked.update(
            command=command, cache=env["TRITON_CACHE_DIR"], empty=not list(Path(env["TRITON_CACHE_DIR"]).iterdir())
        )
        return subprocess.CompletedProcess(command, 0, "1.5\n", "")

    monkeypatch.setattr(subprocess, "run", process)
    assert gpu_first.measure("w8a8", 1, 64, 64) == 1.5
    assert asked["command"][1:] == ["-m", "nybble.bench.gpu_first", "w8a8", "1", "64", "64"]
    assert asked["empty"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "a\nNo GPU\n"))
    with pytest.raises(RuntimeError, match="first call: No GPU"):
        gpu_first.measure("w8a8", 1, 64, 64)


# --- the GPU's state


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo '580.65, 1980, 3201, 1980, 41, 120.5'", {"driver": "580.65", "sm_mhz": "1980", "watts": "120.5"}),
        ("echo 'no devices'; exit 6", {"driver": "unknown", "why": "nvidia-smi: ['no devices']"}),
        ("exit 1", {"driver": "unknown", "why": "nvidia-smi: no output"}),
    ],
    ids=["told", "refused", "silent"],
)
def test_the_state_is_what_nvidia_smi_tells(script: str, expected: dict, tmp_path: Path, monkeypatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = gpu_state.state()
    assert expected.items() <= found.items()
    assert ("unknown" in gpu_state.state_text(found)) == ("why" in found)


def test_without_nvidia_smi_the_state_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gpu_state.state()
    assert {found[name] for name in gpu_state.QUERY.values()} == {"unknown"}
    assert "nvidia-smi is not on PATH" in gpu_state.state_text(found)


# --- runs


def test_steps_keep_their_order() -> None:
    assert gpu_run.steps_of("tune,machine") == ["machine", "tune"]
    assert gpu_run.steps_of(",".join(gpu_run.STEPS)) == list(gpu_run.STEPS)
    with pytest.raises(ValueError, match=r"--only nothing: must be one of machine"):
        gpu_run.steps_of("machine,nothing")


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, measured = tmp_path / "results.jsonl", []

    def one(goal: Goal, done: list) -> dict:
        measured.append(goal.key)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return reached(goal, 1, 2)

    monkeypatch.setattr(gpu_measure, "goal", one)
    monkeypatch.setattr(gpu_measure, "peer", lambda peer, *shape: {"peer": peer.name, "us": 1.0})
    with pytest.raises(KeyboardInterrupt):
        gpu_run.run(out, ["goals"], 60, WORK)
    assert [row["key"] for row in gpu_run.read(out)] == [goal.key for goal in GOALS[:2]]
    assert GOALS[:2] == ALL[:2]
    monkeypatch.setattr(gpu_measure, "limit", lambda limit, done: {"step": "goals", "key": limit.key, "reason": "none"})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    rows = gpu_run.run(out, ["goals"], 60, WORK)
    assert [row["key"] for row in rows if row["step"] == "goals"] == [goal.key for goal in ALL]
    peers = [row for row in rows if row["step"] == "peers"]
    assert {row["peer"] for row in peers} == {name for names in PEERS_OF.values() for name in names}
    assert rows.index(peers[0]) > len(GOALS) / 2, "what compiles itself comes last"
    assert gpu_run.read(out) == rows
    assert len(measured) == len(GOALS) + 1, "what was there was not measured again"


def test_a_run_ends_where_cuda_refuses_everything_and_goes_on_behind_it(tmp_path: Path, monkeypatch, capsys) -> None:
    out, measured, lost = tmp_path / "results.jsonl", [], []

    def one(goal: Goal, done: list) -> dict:
        measured.append(goal.key)
        if len(measured) != 2:
            return reached(goal, 1, 2)
        lost.append(goal)
        return {"step": "goals", "key": goal.key, "reason": "CUDA error: misaligned address"}

    def synchronize() -> None:
        if lost:
            raise RuntimeError("CUDA error: misaligned address\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(gpu_measure, "goal", one)
    monkeypatch.setattr(gpu_run.Work, "whole", lambda first: gpu_run.Work(ALL[:4]))
    arguments = ["--out", str(out), "--only", "goals"]
    assert gpu_run.main(arguments) == gpu_run.LOST
    said = capsys.readouterr()
    assert f"gpu_run: {ALL[1].key}: the GPU is unusable for this process: CUDA error: misaligned" in said.err
    assert said.out.splitlines()[-1].startswith("goals: 2 of 4 measured, 1 failed, ")
    assert [row["key"] for row in gpu_run.read(out)] == [goal.key for goal in ALL[:2]]
    lost.clear()
    assert gpu_run.main(arguments) == 0
    assert measured == [goal.key for goal in ALL[:4]], "the one that broke it is not tried again"


def test_a_result_that_was_not_tried_is_tried_later(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = next(limit for limit in LIMITS if limit.figure == OF_COPY)
    row = gpu_measure.limit(copied, [])
    assert row["reason"] == "no ceilings in this file"
    assert not gpu_run.has([row], "goals", copied.key)
    monkeypatch.setattr(gpu_operations, "operation", lambda *_, **__: {"us": 1.0, "gbps": 9.0})
    later = gpu_measure.limit(copied, [CEILINGS])
    assert gpu_run.has([row, later], "goals", copied.key)
    assert gpu_run.summary([row, later], gpu_run.Work((copied,)), 1).startswith("goals: 1 of 1 measured, 0 failed")


def test_no_time_left_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_measure, "goal", lambda *_: pytest.fail("measured"))
    assert gpu_run.run(tmp_path / "results.jsonl", [*gpu_run.STEPS][:-1], 0, WORK) == []


def test_first_calls_are_left_out_unless_they_are_asked_for() -> None:
    without = gpu_run.Work.whole(first=False).goals
    assert {goal.key for goal in set(ALL) - set(without)} == {limit.key for limit in LIMITS if limit.figure == FIRST}


def test_a_result_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "RESULT_S", 0.05)
    monkeypatch.setattr(gpu_measure, "product", lambda kind, **shape: time.sleep(5))
    monkeypatch.setattr(gpu_measure, "peer", lambda *_, **shape: {"us": 7.0})
    work = gpu_run.Work(ALL[:1], ())
    begin = time.monotonic()
    (row,) = gpu_run.goals_step([], time.monotonic() + 60, work)
    assert time.monotonic() - begin < 3
    assert row["reason"] == "took more than 0.05 s"
    with gpu_run.at_most(60):
        pass
    time.sleep(0.06)  # no alarm is left


@no_gpu
@pytest.mark.full
def test_a_dry_run_measures_every_goal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "results.jsonl"
    assert gpu_run.main(["--out", str(out), "--only", "machine,ceilings,goals,end", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert re.fullmatch(
        r"goals: (\d+) of \1 measured, \d+ failed, \d+ of \d+ peers timed, \d+ s", text.splitlines()[-1]
    )
    assert UNMEASURED not in text
    rows = gpu_run.read(out)
    reasons = {row["reason"].partition(":")[0] for row in rows if row["step"] == "goals" and "reason" in row}
    # bfloat16 weights have no kernel on a CPU; peers may not be installed.
    assert reasons <= {"no GPU kernel", *PEERS_OF}
    assert "met" not in text
    assert "MISSED" not in text, "nothing was measured, so nothing is checked"


def test_whole_steps_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.jsonl"
    out.write_text(f"{json.dumps(CEILINGS)}\n", encoding="utf-8")
    monkeypatch.setattr(gpu_measure, "ceilings", lambda: pytest.fail("measured"))
    assert gpu_run.run(out, ["ceilings"], 60, WORK) == [CEILINGS]


@pytest.mark.parametrize("line", ["{", "[]", '{"step": "goals"}'])
def test_a_file_that_is_no_results_is_refused(tmp_path: Path, line: str) -> None:
    out = tmp_path / "results.jsonl"
    out.write_text(f"{json.dumps(CEILINGS)}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.jsonl:2"):
        gpu_run.read(out)


def test_a_peer_of_a_goal_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    goal = GOALS[0]
    monkeypatch.setattr(gpu_measure, "product", lambda kind, **shape: {"us": 1.0})
    monkeypatch.setattr(gpu_measure, "peer", lambda *_, **shape: {"us": 7.0})
    first = gpu_measure.goal(goal, [])
    assert first["over_us"] == 7.0
    monkeypatch.setattr(gpu_measure, "peer", lambda *_, **shape: pytest.fail("timed again"))
    assert gpu_measure.goal(goal, [first])["over_us"] == 7.0


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="not timed"):
        gpu_measure._check(torch.ones(3, 3), torch.full((3, 3), 1.1), 0.02)
    with pytest.raises(RuntimeError, match="not timed"):
        gpu_measure._check(torch.full((3, 3), torch.nan), torch.ones(3, 3), 0.02)
    gpu_measure._check(torch.ones(3, 3), torch.full((3, 3), 1.01), 0.02)

    def wrong(kind: WeightKind, **shape: int) -> dict:
        raise RuntimeError("relative error 3")

    monkeypatch.setattr(gpu_measure, "product", wrong)
    monkeypatch.setattr(gpu_measure, "peer", lambda *_, **shape: {"us": 7.0})
    assert gpu_measure.goal(GOALS[0], [])["reason"] == "relative error 3"


@no_gpu
def test_the_calls_that_are_timed_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Once(gpu_dry.FromReference):
        """Right at its first call; later ones write nothing."""

        def __call__(self, *arguments: object) -> None:
            if not hasattr(self, "called"):
                self.called = True
                super().__call__(*arguments)

    spec = next(spec for spec in specs() if spec.name == "w8a16_sm80")
    for plan, reason in ((gpu_dry.FromReference, None), (Once, "relative error nan")):
        monkeypatch.setattr(gpu_measure, "layout_for", lambda *_: spec.layout)
        monkeypatch.setattr(gpu_measure, "select", lambda problem: spec)
        made = plan(spec.layout, Scheme.parse("w8a16"), 40, 136)
        monkeypatch.setattr(gpu_measure, "plan_for", lambda *_, made=made: made)
        monkeypatch.setattr(gpu_measure.ops, "linear", lambda *_: None)
        with gpu_dry.stand_in():
            if reason is None:
                assert gpu_measure.product(WeightKind.parse("w8a16"), 3, 40, 136)["runs"] == spec.name
            else:
                with pytest.raises(RuntimeError, match=reason):
                    gpu_measure.product(WeightKind.parse("w8a16"), 3, 40, 136)


@no_gpu
@pytest.mark.parametrize(("of", "said"), [("codes", "codes"), ("scale", "scales"), ("zero", "zero points")])
def test_a_wrong_operation_is_not_timed(of: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, *rest = gpu_operations._ROWS["quantize"]

    def spoiled(x: torch.Tensor) -> object:
        got = one(x)
        value = getattr(got, of)
        return got._replace(**{of: value * (1 + 1e-5) if of == "scale" else value.int() + 2})

    gpu_operations.calls("quantize", 2, 8, 256, "cpu")
    monkeypatch.setitem(gpu_operations._ROWS, "quantize", (spoiled, *rest))
    with pytest.raises(RuntimeError, match=f"{said} differ from the reference; not timed"):
        gpu_operations.calls("quantize", 2, 8, 256, "cpu")


# --- commands


@no_gpu
def test_without_a_gpu_the_commands_say_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert gpu_run.main(["--out", str(tmp_path / "results.jsonl")]) == 1
    assert not list(tmp_path.iterdir())
    assert gpu_tune.main([]) == 1
    assert capsys.readouterr().err.count("no CUDA device") == 2


def test_the_report_of_a_file_needs_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "results.jsonl"
    out.write_text("".join(f"{json.dumps(row)}\n" for row in (MACHINE, CEILINGS)), encoding="utf-8")
    assert gpu_run.main(["--out", str(out), "--report"]) == 0
    assert capsys.readouterr().out.startswith("NVIDIA H100")
    with pytest.raises(SystemExit):
        gpu_run.main(["--out", str(out), "--only", "nothing"])
