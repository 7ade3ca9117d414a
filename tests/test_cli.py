"""The command line, run as a user runs it: in a process of its own."""

import dataclasses
import json
import os
import platform
import subprocess
import sys

import pytest

import nybble
from nybble.__main__ import main
from nybble.dispatch import targets
from nybble.dispatch.registry import all_specs


def cli(*args):
    return subprocess.run(
        [sys.executable, "-m", "nybble", *args], capture_output=True, text=True, timeout=300, check=False
    )


def test_info_prints_versions_targets_and_threads():
    done = cli("info")
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("nybble", "python", "torch", "numpy", "cpu", "features", "threads", "OpenMP", "targets"):
        assert any(line.startswith(word) for line in done.stdout.splitlines()), word
    assert platform.python_version() in done.stdout


def test_info_json_is_complete():
    done = cli("info", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    info = json.loads(done.stdout)
    assert info["versions"]["nybble"] == nybble.__version__
    assert info["threads"] >= 1
    assert "scalar" in info["targets"]
    assert set(info["missing"]).isdisjoint(info["targets"])
    assert all(info["missing"].values()), "each missing target has a reason"


def test_kernels_prints_every_kernel():
    done = cli("kernels")
    assert (done.returncode, done.stderr) == (0, "")
    table, _, _ = done.stdout.partition("\n\n")
    assert [line.split()[0] for line in table.splitlines()[2:]] == [k["name"] for k in nybble.kernels()]


@pytest.mark.parametrize("command", ["info", "kernels"])
def test_long_reasons_fit_a_terminal(command, monkeypatch, capsys):
    """Each reason is printed once, below the table of the kernels that it is of."""
    machine = targets.detect()
    reason = " ".join(["a reason of many words"] * 9)
    lost = {name: reason for name in ("scalar", "avx2", "neon") if name in machine.targets}  # built here
    gone = dataclasses.replace(machine, targets=("torch",), missing={**machine.missing, **lost})
    gone = dataclasses.replace(gone, features=tuple(f"feature{i}" for i in range(60)))
    monkeypatch.setattr(targets, "detect", lambda: gone)
    assert main([command]) == 0
    out, _ = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 120
    words = " ".join(out.split())
    assert words.count(reason) == {"info": len(lost), "kernels": 1}[command]
    if command == "kernels":
        mark = words.partition(f" {reason}")[0].split()[-1]
        rows = [line for line in out.partition("\n\n")[0].splitlines() if f"no {mark}" in line]
        assert {line.split()[0] for line in rows} == {spec.name for spec in all_specs() if spec.target in lost}


def test_kernels_json_says_why_not():
    done = cli("kernels", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    kernels = json.loads(done.stdout)
    assert kernels == nybble.kernels()
    assert any(k["usable"] for k in kernels)
    assert all(k["usable"] or k["why_not"] for k in kernels)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("args", [(), ("nothing",), ("info", "--nothing")], ids=["none", "command", "option"])
def test_wrong_usage_exits_2_and_shows_the_usage(args):
    done = cli(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: nybble")


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize(("variable", "value"), [("NYBBLE_TARGET", "nothing"), ("NYBBLE_PLUGINS", "no")])
def test_a_variable_with_a_wrong_value_exits_1_with_one_line(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    done = cli("info")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert variable in done.stderr


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("words", [["-m", "nybble", "kernels"], ["-m", "nybble.bench", "docs", "--check"]])
def test_a_broken_plug_in_exits_1_with_one_line(tmp_path, monkeypatch, words):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nybble.targets]\nmine = broken_rows:ROW\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "plug-in broken 1.0" in done.stderr


def test_a_reader_that_stops_early_is_no_error():
    command = f"'{sys.executable}' -m nybble kernels --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, check=False)  # noqa: S607
    assert (done.returncode, done.stdout, done.stderr) == (0, "[", "")


def test_a_missing_extra_exits_1_with_one_line(monkeypatch, capsys):
    import nybble.demo.model

    monkeypatch.setattr(nybble.demo.model.importlib.util, "find_spec", lambda name, package=None: None)
    assert main(["demo", "--quick"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "pip install 'nybble[demo]'" in err
