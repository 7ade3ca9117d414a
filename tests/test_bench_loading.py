"""The bench of loading: libraries take turns in processes of their own, and what cannot load says why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import nybble
from nybble.bench import loading
from nybble.bench.__main__ import main
from nybble.bench.loading_files import MAKERS, Size, write_gguf, write_gptq
from nybble.evaluate.memory import has_peak

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
SMALL = Size(hidden=256, inner=512, blocks=2, tokens=64, heads=4)


def test_libraries_take_turns_and_medians_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    times = {"nybble": [(1.0, 2.0, 30.0), (9.0, 9.5, 10.0), (1.5, 1.75, 20.0)], "transformers": []}

    def apart(function: Any, name: str, threads: int) -> tuple[float, float, float]:
        asked.append(name)
        if name == "transformers":
            raise RuntimeError("no\nmemory")
        return times[name][asked.count(name) - 1]

    monkeypatch.setattr(loading, "apart", apart)
    (tmp_path / "config.json").write_text("{}")
    found = list(loading.measure(tmp_path, ["nybble", "transformers", "llama.cpp"], 3, 2))
    assert asked == ["nybble", "transformers", "nybble", "nybble"]
    assert found[0] == loading.Loaded("nybble", 1.5, 2.0, 20.0)
    assert [row.why for row in found] == [None, "RuntimeError: no memory", "loads no directories"]
    text = loading.table(found)
    assert "nybble" in text
    assert "1.50" in text
    assert "loads no directories" in text
    assert loading.rows_of(found, "it", 2)[0] == {
        "reader": "nybble", "seconds": 1.5, "forward_s": 2.0, "peak_mb": 20.0, "why": None, "kind": "loading",
        "checkpoint": "it", "threads": 2,
    }  # fmt: skip


def test_what_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = loading.Reader(("no_such_library.part",), lambda path: lambda: None)
    monkeypatch.setitem(loading.READERS, "other", reader)
    (row,) = loading.measure(tmp_path, ["other"], 2, 1)
    assert row == loading.Loaded("other", why="no_such_library is not installed")


@pytest.mark.parametrize("kind", ["gptq", "gguf-q4-k-m"])
def test_a_made_checkpoint_is_one(kind: str, tmp_path: Path) -> None:
    if kind.startswith("gguf"):
        pytest.importorskip("gguf")
    path = MAKERS[kind](tmp_path / "it", SMALL)
    model, report = nybble.load_pretrained(path, progress=False)
    schemes = {"gptq": {"w4a16g128"}, "gguf-q4-k-m": {"w4ka16g32", "w8a16g16"}}[kind]
    assert {row.scheme for row in report.layers} == schemes
    assert len(report.layers) == 14 + kind.startswith("gguf")
    assert all(row.exact for row in report.layers)
    with torch.inference_mode():
        assert model(torch.arange(8)[None]).logits.shape == (1, 8, 64)


@pytest.mark.skipif(not has_peak(), reason="needs the peak memory of a process")
def test_a_load_is_real(tmp_path: Path) -> None:
    path = write_gptq(tmp_path / "it", SMALL)
    seconds, with_forward, peak = loading._once(str(path), "nybble", torch.get_num_threads())
    assert 0 < seconds < with_forward
    assert peak >= 0


@pytest.mark.full
@pytest.mark.skipif(not has_peak(), reason="needs the peak memory of a process")
def test_the_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gptq(tmp_path / "it", SMALL)
    assert main(["load", str(path), "--by", "nybble", "--rounds", "1", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert (told["kind"], told["reader"], told["checkpoint"], told["why"]) == ("loading", "nybble", str(path), None)
    assert 0 < told["seconds"] < told["forward_s"]
    assert told["peak_mb"] > 0


def test_made_files_are_kept_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("NYBBLE_BENCH_FILES", str(tmp_path / "kept"))
    monkeypatch.setattr(loading, "Size", lambda: SMALL)
    with loading.checkpoint("gguf-q4-k-m") as first:
        assert first.name == "model.gguf"
    written = first.stat().st_mtime_ns
    with loading.checkpoint("gguf-q4-k-m") as again:
        assert (again, again.stat().st_mtime_ns) == (first, written)
    assert write_gguf(tmp_path / "other", SMALL).read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["load", "none"], "none: must be a directory, a file, or one of gptq, gguf-q4-k-m"),
        (["load", ".", "--by", "x*"], r"--by x\*: must match one of nybble, transformers, gptqmodel, llama\.cpp"),
    ],
)
def test_wrong_words_are_refused(words: list[str], rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 1
    assert re.search(rule, capsys.readouterr().err)
