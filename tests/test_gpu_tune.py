"""The tuner of Triton's configurations: what wins, what it writes, and when it ends."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="Triton is for Linux, x86-64 and aarch64")

from nybble.bench import gpu_tune
from nybble.bench.gpu_timing import summarize
from nybble.kernels.configs import SHIPPED, Config, Gpu, read_tuned


def test_the_fastest_configuration_wins_and_ties_go_to_the_first() -> None:
    a, b, c = SHIPPED["w8a8_triton"].configs[:3]
    assert gpu_tune.best([(a, 10.0), (b, 5.0), (c, 7.0)]) == b
    assert gpu_tune.best([(a, 10.0), (b, 9.8), (c, 9.75)]) == a
    with pytest.raises(ValueError, match="must not be empty"):
        gpu_tune.best([])


def test_what_the_tuner_writes_is_what_configs_reads() -> None:
    config = SHIPPED["w4a16_triton"].configs[1]
    made = {"bm": 16, "bn": 64, "bk": 64, "stages": 4, "warps": 4, "split_k": 4}
    row = {"kernel": "w4a16_triton", "n": 4096, "k": 4096, "m": 16, "config": made, "us": 9.0}
    text = gpu_tune.document([row], "a GPU")
    assert json.loads(text)["gpu"] == "a GPU"
    assert read_tuned(text, "sm90", "a test") == {("w4a16_triton", 4096, 4096): {16: config}}
    assert isinstance(config, Config)


def test_tuning_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cell is timed at second 0; the next would start at 5."""
    seconds = iter((0.0, 5.0))
    monkeypatch.setattr(gpu_tune, "machine", lambda device: Gpu("sm90", 132, 227 << 10))
    monkeypatch.setattr(gpu_tune, "calls_of", lambda *problem: lambda config: [lambda: config])
    monkeypatch.setattr(gpu_tune.gpu_timing, "in_graph", lambda calls, replays: summarize([calls[0]().bn * 1e-6]))
    (row,) = gpu_tune.tune([(64, 64)], 5.0, clock=lambda: next(seconds))
    assert (row["m"], row["config"]["bn"], row["us"]) == (16, 32, pytest.approx(32))


def test_every_kernel_with_configurations_is_tuned() -> None:
    assert set(gpu_tune.SCHEMES) == set(SHIPPED)
