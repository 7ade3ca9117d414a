"""The figures of presets besides their tables: whether they are met, and that each is named and computed."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from nybble.bench import figures, presets, quantizing
from nybble.bench.apart import apart
from nybble.bench.setup import THREADS, Setup


def test_figures_have_a_result_on_either_side():
    assert figures.Figure("f", 1.1, "x", 1.15).met
    assert not figures.Figure("f", 1.2, "x", 1.15).met
    assert figures.Figure("f", 1.9, "x", 1.85, at_most=False).met
    assert not figures.Figure("f", 1.8, "x", 1.85, at_most=False).met
    assert str(figures.Figure("f", 1.8, "x", 1.85, at_most=False)) == "f: 1.8x (>= 1.85x) MISSED"
    assert figures.Figure("f", 1.1, "x", 1.15).line()["met"] is True


def test_every_figure_is_named_and_computed(monkeypatch):
    asked = []

    def duel(cases, m, dtype, cache, budget_s):
        asked.append((m, dtype, cache, torch.get_num_threads()))
        return [1e-6 * n * k for _, (n, k) in cases]

    monkeypatch.setattr(figures, "duel", duel)
    before = torch.get_num_threads()
    found = [figure for run in figures.FIGURES for figure in run(1.0)]
    assert torch.get_num_threads() == before
    assert len({figure.name for figure in found}) == len(found)
    values = {figure.name: figure.value for figure in found}
    assert values["4095x4097 over 4096x4096 M=256 w8a8, per operation"] == pytest.approx(1.0)
    assert values["64x64 M=1 fp32 w8a8, module call"] == pytest.approx(4096)
    assert {1, 2} <= {threads for m, _, _, threads in asked if m == 256}


def test_what_quantizing_costs_has_its_bounds(monkeypatch):
    asked = []

    def apart(function, name, threads):
        asked.append((function.__name__, name, threads))
        return (50.0, 134.25) if name in ("w8a8", "w4a8g128") else 3.5

    monkeypatch.setattr(quantizing, "apart", apart)
    monkeypatch.setattr(quantizing, "LARGE", (64, 128))
    monkeypatch.setattr(quantizing, "_LEAST_ROUNDS", 1)
    found = [figure for run in quantizing.QUANTIZING for figure in run(1e-9)]
    assert len({figure.name for figure in found}) == len(found)
    bounds = {figure.topic: (figure.bound, figure.at_most) for figure in found}
    assert bounds == {
        "weights/s": (60.0, False),
        "weights/s, pruned": (60.0, False),
        "time over quantize_dynamic": (1.2, True),
        "peak memory above the model": (134.2, True),
        "measuring for MiniLM": (3.0, True),
        "measuring for a Llama of 7 B": (10.0, True),
    }
    assert {figure.topic: figure.met for figure in found[-2:]} == {
        "measuring for MiniLM": False,
        "measuring for a Llama of 7 B": True,
    }
    threads = torch.get_num_threads()
    assert asked == [
        ("_peak", "w8a8", threads),
        ("_peak", "w4a8g128", threads),
        ("_measuring", "MiniLM", threads),
        ("_measuring", "a Llama of 7 B", threads),
    ]
    assert {len(layers.shapes) for layers in quantizing.MODELS.values()} == {36, 4}


def test_peak_memory_and_measuring_are_real(monkeypatch):
    monkeypatch.setattr(quantizing, "MODELS", {"toy": quantizing.Layers(((64, 64),), torch.float32, 1.0)})
    peak_of = partial(quantizing._peak, shape=(1024, 2048))
    # In a process of its own: memory that this one freed would be used again, unseen.
    peak, two_largest = apart(peak_of, "w8a8", torch.get_num_threads())
    assert two_largest == 2 * 2 * 1024 * 2048 / 1e6
    # Without rollback dense layers go as packed ones come: some layers at a time, never all of them.
    assert 0.5 * 1024 * 2048 / 1e6 < peak < 12 * 1024 * 2048 / 1e6
    assert 0 < quantizing._measuring("toy", torch.get_num_threads()) <= 10


@pytest.mark.parametrize("name", ["cpu-targets", "avx2-targets", "amx-targets"])
def test_presets_end_with_what_quantizing_costs(monkeypatch, name):
    told = []

    def costs(budget_s):
        told.append((budget_s, torch.get_num_threads()))
        yield figures.Figure("costs", 1.0, "x", 1.2)

    def nothing(*_):
        return []

    for part in ("FIGURES", "QUANTIZING"):
        monkeypatch.setattr(presets, part, (costs,))
    for part in ("_results", "_contestants", "_cosines", "over_bf16"):
        monkeypatch.setattr(presets, part, nothing)
    put, steps = [], []
    setup = Setup((), (), 1.0, {}, put.extend, steps.append, mark={"held": "by hand"})
    *_, last = presets.PRESETS[name].run(setup)
    assert last == "costs: 1x (<= 1.2x) met"
    assert told == [(presets.FIGURE_BUDGET_S, THREADS)]
    assert put[-1]["held"] == "by hand"
    assert steps[-1] == "costs"


def test_model_figures_from_lines():
    rows = [{"contestant": "torch bf16", "decode_tokens_s": 16.0, "prefill_tokens_s": 600.0}]
    assert list(figures.model(rows)) == []
    rows.append({"contestant": "nybble w4a8g128", "decode_tokens_s": 80.0, "prefill_tokens_s": 900.0})
    assert [(figure.value, figure.met) for figure in figures.model(rows)] == [
        (80.0, True),
        (5.0, True),
        (900.0, False),
        (1.5, False),
    ]


def test_odd_shapes_are_large_enough_to_count():
    assert all(m * n * k > 10**7 for (n, k), _, m in figures.ODD)


def test_a_duel_checks_and_times_each_case():
    seconds = figures.duel([("w8a8", (33, 64)), ("w4a8g32", (32, 64))], 3, torch.float32, "hot", 1e-9)
    assert len(seconds) == 2
    assert min(seconds) > 0
