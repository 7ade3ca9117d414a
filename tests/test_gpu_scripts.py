"""The scripts for a machine with a GPU and without a network, run where there is neither: what they print last, what they
leave, and that they end in time whatever happens."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

import nybble
from nybble.bench.gpu_run import RESULT_S

BENCH = Path(__file__).resolve().parents[1] / "bench"
RUN, GOALS, PREPARE = (BENCH / f"gpu_{name}.sh" for name in ("run", "goals", "prepare"))
# Seconds that the device may take for each, and files that come back from it.
MOST_SECONDS = {RUN: 280, GOALS: 240}
MOST_FILES = 8

pytestmark = [
    pytest.mark.skipif(not RUN.is_file(), reason="bench/gpu_run.sh is not here: no source tree"),
    pytest.mark.skipif(not (shutil.which("bash") and shutil.which("tar")), reason="needs bash and tar"),
]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def script(
    path: Path, *arguments: object, cwd: Path | None = None, python: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    package = str(Path(nybble.__file__).parents[1])
    environment = {**os.environ, "PYTHON": str(python), "PYTHONPATH": package}
    return subprocess.run(
        ["bash", path, *map(str, arguments)],  # noqa: S607
        capture_output=True, text=True, check=False, timeout=300, cwd=cwd, env=environment,
    )  # fmt: skip


def results(out: Path, name: str) -> set[str]:
    """The names of the files that came back, of which there is one."""
    assert [path.name for path in out.iterdir()] == [f"{name}.tar.gz"]
    with tarfile.open(out / f"{name}.tar.gz") as archive:
        return {Path(member.name).name for member in archive.getmembers() if member.isfile()}


@no_gpu
@pytest.mark.parametrize(
    ("path", "steps", "files", "said"),
    [
        (
            RUN,
            ("install", "smoke", "sanitize-plan", "memcheck", "racecheck"),
            {"smoke.jsonl", "smoke.txt", "memcheck.txt"},
            (r"^smoke: \d+ kernels, 0 failed, \d+ s \(estimate \d+ s\)$", r"^sanitize: \d+ launches, none failed$"),
        ),
        pytest.param(
            GOALS,
            ("install", "measure", "table"),
            {"results.jsonl", "measure.txt", "table.txt"},
            (r"^goals: \d+ of \d+ measured, \d+ failed, \d+ of \d+ peers timed, \d+ s$", r"^K1 +w4a16g128 .*1\.00x"),
            marks=pytest.mark.nightly,  # test_triton_bench.py runs what it measures
        ),
    ],
    ids=["run", "goals"],
)
@pytest.mark.full
def test_a_dry_run_does_every_step_and_leaves_one_tar(path, steps, files, said, tmp_path: Path) -> None:
    done = script(path, "--dry-run", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    listed = ", ".join(f"{step} ok" for step in steps)
    assert re.fullmatch(rf"{path.stem}: {listed}, \d+ s of {MOST_SECONDS[path]}, \S+{path.stem}\.tar\.gz", last)
    for pattern in said:
        assert re.search(pattern, done.stdout, re.MULTILINE), pattern
    assert files <= results(tmp_path / "out", path.stem)
    assert len(list((tmp_path / "out").rglob("*"))) <= MOST_FILES


@pytest.mark.parametrize("path", [RUN, GOALS], ids=["run", "goals"])
def test_where_nothing_can_be_installed_the_tar_is_left_all_the_same(path: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.whl").touch()
    done = script(path, "--out", tmp_path / "out", "--wheels", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(rf"{path.stem}: install failed \(\d+\), \d+ s of .*", done.stdout.splitlines()[-1])
    assert "install.txt" in results(tmp_path / "out", path.stem)


@pytest.mark.parametrize("path", [RUN, GOALS], ids=["run", "goals"])
def test_the_limits_of_the_steps_fit_the_whole(path: Path) -> None:
    text = path.read_text() + (BENCH / "gpu_common.sh").read_text()
    assert f"TOTAL={MOST_SECONDS[path]}\n" in text
    limits = {name: int(seconds) for seconds, name in re.findall(r"^ *limited (\d+) (\S+)", text, re.MULTILINE)}
    loops = {'"$tool"': len(re.search(r"for tool in (.*); do", text)[1].split())} if path == RUN else {}
    most = MOST_SECONDS[path] - int(re.search(r"TOTAL - SECONDS - (\d+)", (BENCH / "gpu_common.sh").read_text())[1])
    assert sum(seconds * loops.get(name, 1) for name, seconds in limits.items()) <= most
    inner, outer = (r"--limit (\d+)", "smoke") if path == RUN else (r"--seconds (\d+)", "measure")
    (seconds,) = re.findall(inner, path.read_text())
    assert int(seconds) + (0 if path == RUN else RESULT_S) < limits[outer]


def test_measuring_goes_on_in_another_process_where_cuda_refuses_the_first(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ $(grep -c -e --only {tmp_path}/calls) != 1 ] || exit 3\n'
    )
    python.chmod(0o755)
    (tmp_path / "nybble.whl").touch()
    done = script(GOALS, "--out", tmp_path / "out", "--wheels", tmp_path, cwd=tmp_path, python=python)
    assert done.returncode == 1, "a fault is not forgotten"
    calls = (tmp_path / "calls").read_text().splitlines()
    measured = [call for call in calls if "--only" in call]
    assert len(measured) == 2, done.stdout
    assert len({call.partition(" --seconds ")[0] for call in measured}) == 1
    assert "gpu_goals: install ok, measure failed (3), measure-again ok, table ok, " in done.stdout


def test_a_step_that_takes_too_long_is_ended_and_the_rest_goes_on(tmp_path: Path) -> None:
    text = (BENCH / "gpu_common.sh").read_text().partition("if [ -n")[0]
    program = f"NAME=x TOTAL=20\n{text}\nlimited 1 slow sleep 30\nlimited 5 quick echo hello\nlimited 5 bad false\n"
    (tmp_path / "x.sh").write_text(program)
    done = script(tmp_path / "x.sh", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "x: slow took more than 1 s, quick ok, bad failed (1), " in done.stdout
    assert results(tmp_path / "out", "x") == {"slow.txt", "quick.txt", "bad.txt"}
    (tmp_path / "x.sh").write_text(program.replace("TOTAL=20", "TOTAL=5"))
    done = script(tmp_path / "x.sh", "--out", tmp_path / "out", cwd=tmp_path)
    assert "x: slow: no time left, quick: no time left" in done.stdout


@pytest.mark.parametrize("path", [RUN, GOALS, PREPARE], ids=["run", "goals", "prepare"])
@pytest.mark.parametrize("arguments", [["--nothing"], ["--only", "x"]], ids=["option", "step"])
def test_what_a_script_does_not_know_is_refused(path: Path, arguments: list[str], tmp_path: Path) -> None:
    done = script(path, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert f"bench/{path.name}" in done.stderr or "--only x: must be one of wheel, peers, check" in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_wheels_or_python_nothing_is_called_right(tmp_path: Path) -> None:
    done = script(RUN, "--out", tmp_path / "out", "--wheels", tmp_path / "none", cwd=tmp_path)
    assert done.returncode == 1
    assert f"--wheels {tmp_path}/none: contains no wheels" in done.stderr
    assert "gpu_run: no wheels, " in done.stdout
    done = script(RUN, "--out", tmp_path / "other", "--dry-run", cwd=tmp_path, python=tmp_path / "nothing")
    assert done.returncode == 2
    assert f"PYTHON={tmp_path}/nothing: must be a Python" in done.stderr
