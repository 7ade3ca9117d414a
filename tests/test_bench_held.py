"""The presets for AVX2 and AMX: what is held and how, which machines they refuse, and a run with its resumption."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from nybble.bench import held, peers, presets, run
from nybble.bench.goal_tables import AVX2, OVER_FP32
from nybble.bench.peers.peer import Peer
from nybble.bench.progress import steps
from nybble.bench.setup import Setup

cli = importlib.import_module("nybble.bench.__main__")

LIMITS = {"dram_gbps": 40, "dram_huge_gbps": 45, "l3_gbps": 200, "bf16_gflops": 900, "fp32_gflops": 500}
CEILINGS = {"threads": {"2": {**LIMITS, "int8_gops": 2000, "int7_gops": 2100, "int4_gops": 2200}}}


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


@pytest.mark.parametrize("preset", ["whole-models", "modules"])
def test_any_run_of_models_that_is_held_says_so(monkeypatch, wide_cpu, preset):
    assert presets.PRESETS[preset].mark() == {}
    for name, value in held.VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert presets.PRESETS[preset].mark() == {"held": "held to avx2 on A wide CPU"}
    monkeypatch.setenv(held.VOUCHED, "onnxruntime")
    assert presets.PRESETS[preset].mark()["vouched"] == "onnxruntime"


def test_a_library_that_cannot_be_held_is_left_out_unless_vouched_for(monkeypatch, wide_cpu):
    free = Peer("free", 8, "int8", (torch.float32,), lambda *_: [], needs=("onnxruntime",))
    tame = Peer("tame", 8, "int8", (torch.float32,), lambda *_: [], needs=("torch",))
    one, other = held.admit([free, tame])
    assert "cannot be held to AVX2" in one.why_not()
    assert other.why_not() is None
    assert "vouched" not in held.mark()
    monkeypatch.setenv(held.VOUCHED, "llama_cpp,onnxruntime")
    assert held.admit([free])[0].refused is None
    assert held.mark() == {"held": "held to avx2 on A wide CPU", "vouched": "llama_cpp, onnxruntime"}
    assert held.told([{}, held.mark()]).endswith("(llama_cpp, onnxruntime by other means, as NYBBLE_BENCH_HELD says)")
    assert held.told([{}]) == ""


def test_only_libraries_without_a_variable_can_be_vouched_for(monkeypatch, wide_cpu, capsys):
    monkeypatch.setenv(held.VOUCHED, "ggml,onnxruntime")
    assert cli.main(["--preset", "avx2-targets"]) == 1
    said = "NYBBLE_BENCH_HELD='ggml,onnxruntime': ggml: must be one of onnxruntime, openvino, llama_cpp"
    assert said in capsys.readouterr().err


def test_amx_targets_refuse_a_machine_without_amx_before_anything_is_written(monkeypatch, tmp_path, capsys):
    machine = presets.targets.Machine("A CPU", (), ("torch", "scalar"), {"amx": "this CPU lacks amx_int8"}, None)
    monkeypatch.setattr(presets.targets, "detect", lambda: machine)
    out = tmp_path / "amx.jsonl"
    assert cli.main(["--preset", "amx-targets", "--out", str(out)]) == 1
    assert "this machine (A CPU) cannot run AMX kernels: this CPU lacks amx_int8" in capsys.readouterr().err
    assert not out.exists()


def test_steps_are_told_on_stderr_where_that_is_no_terminal(capsys):
    with steps(2) as advance:
        advance("the first")
        advance("the second")
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" after ")[0] for line in said] == ["1 of 2", "2 of 2"]
    assert said[1].endswith(" s: the second")


@pytest.mark.full
def test_the_avx2_preset_runs_resumes_and_runs_a_part(monkeypatch, tmp_path, capsys):
    shapes = ((32, 128), (16, 128))
    table = replace(AVX2, shapes=shapes, ms=(1,), goals=tuple(goal for goal in AVX2.goals if goal.m == 1))
    monkeypatch.setattr(presets, "AVX2", table)
    monkeypatch.setattr(presets, "QUANTIZING", ())
    monkeypatch.setitem(presets.SETS, "minilm", shapes[1:])
    monkeypatch.setattr(presets, "cosines", lambda schemes: [
        {"kind": "cosine", "scheme": scheme, "cosine": 0.9989, "reason": None} for scheme in schemes])  # fmt: skip
    monkeypatch.setattr(run, "COLD_CACHES", 0)
    rows = []
    setup = Setup(peers.matching("torch fp32"), (), 0.001, CEILINGS, rows.extend, lambda _: None)
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
