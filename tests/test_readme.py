"""The README says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nybble.__main__ import kernel_markdown
from nybble.bench import gpu_goals, gpu_run
from nybble.bench.goals import TARGETS

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def text() -> str:
    if not README.exists():
        pytest.skip("README.md is not beside the tests")
    return README.read_text(encoding="utf-8")


def between(text: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert found, f"no markers for {name}"
    return found[1].strip()


def test_the_kernel_table_is_the_registry(text: str) -> None:
    assert between(text, "kernels") == kernel_markdown(), "paste the output of `nybble kernels --markdown`"


def test_the_gpu_table_is_what_was_measured(text: str) -> None:
    runs = sorted((README.parent / "bench" / "results").glob("gpu-*.jsonl"))
    table = gpu_goals.markdown(gpu_run.read(runs[-1]) if runs else ())
    assert between(text, "gpu").endswith(table), (
        "paste the output of `python -m nybble.bench.gpu_run --report --markdown`"
    )


def test_the_demo_table_is_there_with_its_date_and_cpu(text: str) -> None:
    table = between(text, "demo")
    assert re.search(r"20\d\d-\d\d-\d\d", table)
    for contestant in ("torch fp32", "torch bf16", "quantize_dynamic", "nybble w8a8", "w4a8g128", "w4a16g128"):
        assert contestant in table


def test_the_targets_table_is_there_with_its_date_and_cpu(text: str) -> None:
    table = between(text, "targets")
    assert re.search(r"\b20\d\d-\d\d-\d\d\b", table), "the date of the run"
    assert re.search(r"\b(AMD|Intel|Arm)\b.*torch \d", table, re.DOTALL), "the CPU and torch's version"
    for goal in TARGETS:
        row = re.search(rf"^\| {goal.scheme} \|.*$", table, re.MULTILINE)
        assert row, f"no row for {goal.scheme}"
        assert f"/ {goal.ratio:g}x" in row[0], f"{goal.scheme} M={goal.m} is asked for {goal.ratio:g}x"


def test_the_usage_example_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors", reason="the example saves a model, which needs the extra `save`")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nybble.passes.measure._measure", lambda *_: 2.0)  # a busy machine may measure otherwise
    names: dict[str, object] = {}
    exec(compile(example[1], "README.md", "exec"), names)  # noqa: S102
    assert (tmp_path / "quantized").is_dir()
    assert repr(names["fresh"]) == repr(names["model"])


def test_the_sparse_example_runs(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.setattr("nybble.passes.measure._measure", lambda *_: 2.0)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102
    assert repr(names["model"]).count("scheme=sp32of128w8a8") == 2
