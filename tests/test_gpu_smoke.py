"""The smoke test of GPUs, where there is none: what it checks, what it says of kernels that are wrong or that end their
process, and that all of it fits the time."""

from __future__ import annotations

import json
import subprocess
from time import monotonic

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

from nybble.bench import gpu_dry, gpu_smoke, gpu_smoke_check
from nybble.bench.gpu_smoke_check import DTYPES, INSTANCES, SHAPES, TIMES, cases, compare, schemes

SPECS = gpu_smoke.of_gpus()
LINEAR = [spec for spec in SPECS if spec.op == "linear"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and Triton is not interpreted")


def test_it_fits_its_time_on_sixteen_cores() -> None:
    assert 40 < gpu_smoke.estimate(SPECS, gpu_smoke.JOBS) <= gpu_smoke.LIMIT_S
    assert gpu_smoke.estimate(SPECS, 1) > sum(map(gpu_smoke.cost, SPECS))


@pytest.mark.parametrize("spec", LINEAR, ids=lambda spec: spec.name)
def test_a_kernel_is_checked_over_its_range_in_every_dtype_and_both_symmetries(spec) -> None:
    found = cases(spec, False, DTYPES)
    assert {(case.n, case.k) for case in found} == set(SHAPES)
    assert all(spec.takes(case.m) for case in found)
    assert {case.dtype for case in found} == set(spec.act_dtypes)
    assert {case.scheme.symmetric for case in found} == ({True, False} if spec.scheme in ("w4a16", "w4a8") else {True})
    rows = {case.m for case in found}
    assert min(rows) == spec.m_range[0]
    assert max(rows) == (spec.m_range[1] or max(gpu_smoke_check.MANY, spec.m_range[0]))
    if spec.target == "triton":
        assert len({case.scheme for case in found}) <= 2, "each is compiled"
    else:
        assert {case.scheme for case in found} == set(schemes(spec))


@pytest.mark.parametrize("spec", LINEAR, ids=lambda spec: spec.name)
def test_a_dry_run_has_cases_of_every_kernel(spec) -> None:
    assert cases(spec, True, gpu_dry.INTERPRETED if spec.target == "triton" else DTYPES)


def test_one_of_each_has_every_target_and_op() -> None:
    found = gpu_smoke.one_of_each(SPECS)
    assert {(spec.target, spec.op) for spec in found} == {(spec.target, spec.op) for spec in SPECS}
    assert len(found) == len({(spec.target, spec.op) for spec in SPECS})


# --- what is wrong


def test_the_first_failure_is_told_in_detail() -> None:
    right, bound = torch.ones(20, 300).double(), torch.full((20, 300), 0.1)
    got = right.float()
    assert compare(got + 0.05, right, bound) == {"ok": 0.5}
    got[9, 65], got[17, 129], got[17, 257] = 3.0, torch.nan, 0.0
    found = compare(got, right, bound)
    assert found["wrong"] == "3 of 6000 outputs, 1 of them NaN"
    assert found["first"] == "y[9, 65] = 3, not 1 +- 0.1"
    assert (found["m mod 8"], found["n mod 64"]) == ("1: 3", "1: 3")
    assert found["n mod 256"] == "1: 1, 65: 1, 129: 1"
    everything = compare(got + 9, right, bound)
    assert everything["n mod 64"].startswith("0: 100, ")
    assert everything["n mod 64"].endswith("and 56 more")


@no_gpu
def test_a_wrong_kernel_and_one_that_writes_beside_its_output_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = next(spec for spec in LINEAR if spec.target != "triton")
    case = cases(spec, True, DTYPES)[0]
    assert gpu_smoke_check.check(spec, case, "cpu")["ok"] <= 1
    right = gpu_dry.FromReference.__call__

    def spoiled(self, x, packed, bias, out):
        right(self, x, packed, bias, out)
        out[-1, -1] += 1

    monkeypatch.setattr(gpu_dry.FromReference, "__call__", spoiled)
    assert gpu_smoke_check.check(spec, case, "cpu")["wrong"].startswith("1 of ")

    def beside(self, x, packed, bias, out):
        right(self, x, packed, bias, out)
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0)

    monkeypatch.setattr(gpu_dry.FromReference, "__call__", beside)
    assert gpu_smoke_check.check(spec, case, "cpu") == {"wrong": "writes outside its output"}

    def once(self, x, packed, bias, out):
        self.seen = getattr(self, "seen", (x.data_ptr(), packed.data_ptr()))
        if self.seen == (x.data_ptr(), packed.data_ptr()):
            right(self, x, packed, bias, out)

    monkeypatch.setattr(gpu_dry.FromReference, "__call__", once)
    found = gpu_smoke_check.check(spec, case, "cpu")
    assert found["wrong"] == f"{case.m * case.n} of {case.m * case.n} outputs, {case.m * case.n} of them NaN"
    assert found["call"] == "the second"

    def refuses(self, x, packed, bias, out):
        raise RuntimeError("misaligned address\nand more")

    monkeypatch.setattr(gpu_dry.FromReference, "__call__", refuses)
    rows = list(gpu_smoke_check.kernel_rows(spec, True, "cpu"))
    assert rows[1] == {"wrong": "RuntimeError: misaligned address"}


# --- processes


def process(monkeypatch: pytest.MonkeyPatch, code: int, rows: list[dict], errors: str = "") -> None:
    output = "".join(f"{json.dumps(row)}\n" for row in rows).encode() + b'{"half a li'
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code, output, errors.encode())
    )


def one(what: str = "a kernel", seconds: float = 10) -> gpu_smoke.Outcome:
    return gpu_smoke.run_one(what, [], monotonic() + seconds)


def test_a_kernel_that_is_right_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch, 0, [{"case": "one"}, {"ok": 0.25}, {"case": "two"}, {"ok": 0.5}])
    outcome = one()
    assert not outcome.failed
    assert gpu_smoke.kernel_text(outcome).startswith("ok      a kernel  2 cases, at most 0.50 of the bound")


def test_a_kernel_that_is_wrong_has_the_details_of_its_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch, 0, [{"case": "one"}, {"wrong": "3 of 9", "first": "y"}, {"case": "two"}, {"wrong": "all"}])
    text = gpu_smoke.kernel_text(one())
    assert "FAILED  a kernel  2 of 2 cases" in text
    assert "case: one\n        wrong: 3 of 9\n        first: y" in text
    assert text.endswith("also two: all")


@pytest.mark.parametrize(
    ("code", "rows", "said"),
    [
        (-11, [{"case": "one"}, {"ok": 0.1}, {"case": "two"}], "died: signal 11 in two: last words"),
        (1, [], "died: exit 1 in startup: last words"),
    ],
)
def test_a_kernel_that_ends_its_process_is_told(code: int, rows: list, said: str, monkeypatch) -> None:
    process(monkeypatch, code, rows, "first words\nlast words\n")
    outcome = one()
    assert outcome.failed
    assert said in gpu_smoke.kernel_text(outcome)


def test_a_kernel_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout, b'{"case": "one"}\n', None)

    monkeypatch.setattr(subprocess, "run", hangs)
    outcome = one(seconds=5)
    assert "died: took more than 5 s in one" in gpu_smoke.kernel_text(outcome)
    assert "no time left" in gpu_smoke.kernel_text(one(seconds=-1))


def test_one_that_says_nothing_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    process(monkeypatch, 0, [])
    assert one().failed


def test_timings_come_last_with_time_of_their_own(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    seen = {}

    def process(what, flags, until):
        seen[what] = until
        return gpu_smoke.Outcome(what, 1.0, [{"case": what}, {"ok": 0.1}])

    monkeypatch.setattr(gpu_smoke, "run_one", process)
    outcomes = gpu_smoke.smoke(SPECS, [], 4, 1000)
    assert list(seen)[-1] == TIMES
    assert seen.pop(TIMES) == 1000
    assert set(seen.values()) == {1000 - gpu_smoke.TIMES_S}
    assert (outcomes[0].name, outcomes[-1].name) == (INSTANCES, TIMES)
    assert {outcome.name for outcome in outcomes[1:-1]} == {spec.name for spec in SPECS}
    assert len(capsys.readouterr().out.splitlines()) == len(SPECS) + 4


# --- the whole of it


@no_gpu
@pytest.mark.full
def test_a_dry_run_ends_with_its_summary(tmp_path, capsys: pytest.CaptureFixture) -> None:
    spec = next(spec for spec in LINEAR if spec.target != "triton")
    out = tmp_path / "smoke.jsonl"
    assert gpu_smoke.main(["--dry-run", "--jobs", "2", "--only", spec.name, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1].startswith("smoke: 1 kernels, 0 failed, ")
    assert max(text.index("== instances"), text.index(spec.name)) < text.index("== times")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["name"] for row in rows] == [INSTANCES, spec.name, TIMES]
    assert len(rows[-1]["results"]) == len(gpu_smoke_check.TIMED)
    assert all("us" in row for row in rows[-1]["results"]), "each of the timings was taken"


@no_gpu
def test_without_a_gpu_every_kernel_is_skipped(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke, "run_one", lambda what, *_: gpu_smoke.Outcome(what, 0.0, died="no GPU"))
    assert gpu_smoke.main([]) == 1
    text = capsys.readouterr().out
    assert text.count("skipped ") == len(SPECS)
    assert text.splitlines()[-1].startswith("smoke: 0 kernels, 2 failed"), "what the driver says, and the timings"


@pytest.mark.parametrize("what", [INSTANCES, TIMES])
def test_it_fails_where_one_that_is_no_kernel_does(what: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def process(name, *_):
        return gpu_smoke.Outcome(name, 0.0, [{"case": name}, {"ok": 0.1}], died="it" if name == what else "")

    monkeypatch.setattr(gpu_smoke, "run_one", process)
    assert gpu_smoke.main(["--dry-run"]) == 1
    assert ", 1 failed, " in capsys.readouterr().out


def test_a_name_that_no_kernel_has_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu_smoke.main(["--only", "nothing*"])
    assert "--only nothing*: matches no kernel for GPUs" in capsys.readouterr().err
